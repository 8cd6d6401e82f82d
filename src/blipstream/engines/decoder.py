"""A decoder graph and its KV cache, as the decode loop needs them.

The graph is the one that :mod:`blipstream.contract` declares. It updates its caches in place: the ``past`` and
``present`` tensors of a run are bound to the same memory, rows 0..n-1 for a decode step, the rows behind the running
sequences for a prefill. Nothing is gathered and nothing is copied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from blipstream.contract import DECODER_IO, DecoderSection
from blipstream.decoding.request import Prompt
from blipstream.engines.base import Array, BoundRun, Engine, TensorInfo
from blipstream.engines.cache import KVCache
from blipstream.errors import EngineError


class RowDecoder(ABC):
    """Rows of a KV cache, and the graph that appends a token to each: what every language model has.

    It owns its engine and its cache.

    Args:
        engine: the decoder's graph.
        sizes: the model's sizes and the cache's capacity, from the manifest.
    """

    def __init__(self, engine: Engine, sizes: DecoderSection) -> None:
        self._engine = engine
        self._sizes = sizes
        self._cache = engine.allocate_cache(
            DECODER_IO.cache_inputs(sizes.num_layers)[0],
            num_layers=sizes.num_layers,
            num_rows=sizes.max_sequences,
            num_heads=sizes.num_key_value_heads,
            max_tokens=sizes.max_tokens,
            head_dim=sizes.head_dim,
        )
        self._step = StepBuffers(sizes)
        self._steps: dict[int, BoundRun] = {}

    @property
    def max_sequences(self) -> int:
        """Rows of the KV cache."""
        return self._sizes.max_sequences

    @property
    def max_tokens(self) -> int:
        """Tokens that one row holds."""
        return self._sizes.max_tokens

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt in tokens, soft tokens included."""
        return self._sizes.max_prompt_tokens

    @property
    def decoder_start_token_id(self) -> int | None:
        """The token that every row begins with, behind an encoder; None for a decoder-only model."""
        return None if self._sizes.encoder is None else self._sizes.encoder.decoder_start_token_id

    @property
    def vocab_size(self) -> int:
        """Width V of the logits."""
        return self._sizes.vocab_size

    @abstractmethod
    def prefill(self, first_row: int, prompts: Sequence[Prompt]) -> npt.NDArray[np.float32]:
        """Fill rows ``first_row ..`` with the prompts, all at once; return the logits (B, V) that follow each.

        Raises:
            EngineError: a graph failed; the rows' contents are undefined.
        """

    def decode(self, token_ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Append token ``token_ids[i]`` to row i, which holds ``lengths[i]`` tokens; return the logits (n, V).

        The logits are a view of the decoder's own buffer: the next call overwrites them.

        Raises:
            EngineError: the graph failed; the rows' contents are undefined.
        """
        count = len(token_ids)
        if count not in self._steps:  # binding the cache costs more than the rest of a step's preparation: once each n
            self._steps[count] = self._bind(self._step_inputs(0, count), self._step.logits[:count], 0)
        self._fill_step(0, token_ids, lengths)
        self._steps[count].run()
        return self._step.logits[:count]

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy row ``source``, which holds ``length`` tokens, over row ``target``."""
        self._cache.move_row(source, target, length)

    def close(self) -> None:
        """Release the engine and the cache's bindings."""
        self._steps.clear()
        self._engine.close()

    @abstractmethod
    def _step_inputs(self, first_row: int, count: int) -> dict[str, Array]:
        """The small inputs of a step of ``count`` rows, views of what :meth:`_fill_step` fills."""

    def _fill_step(self, first_row: int, token_ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> None:
        """Prepare a step that appends ``token_ids`` (n,) to rows ``first_row ..`` with ``lengths`` (n,) tokens."""
        self._step.fill(first_row, token_ids, lengths)

    def _caches(self) -> list[tuple[KVCache, list[str], list[str]]]:
        """Each cache, with the names of its tensors among the graph's inputs and outputs."""
        num_layers = self._sizes.num_layers
        return [(self._cache, DECODER_IO.cache_inputs(num_layers), DECODER_IO.cache_outputs(num_layers))]

    def _bind(self, inputs: dict[str, Array], logits: npt.NDArray[np.float32], first_row: int) -> BoundRun:
        outputs: dict[str, Array] = {DECODER_IO.logits: logits}
        inputs = dict(inputs)
        for cache, input_names, output_names in self._caches():
            rows = cache.rows(first_row, len(logits))
            inputs |= dict(zip(input_names, rows, strict=True))
            outputs |= dict(zip(output_names, rows, strict=True))
        return self._engine.bind(_declared(inputs, self._engine.inputs), _declared(outputs, self._engine.outputs))

    def _check_graph(self) -> None:
        """Raise unless the graph has the inputs and outputs of such a decoder."""
        wanted = {*self._step_inputs(0, 1), DECODER_IO.logits}
        for _, input_names, output_names in self._caches():
            wanted.update(input_names, output_names)
        optional = DECODER_IO.optional(self._sizes.num_layers)
        check_tensors(self._engine, wanted, f"a decoder of {self._sizes.num_layers} layers", optional)


class CachedDecoder(RowDecoder):
    """A decoder-only language model: the :class:`~blipstream.decoding.request.Decoder` of most bundles.

    Raises:
        EngineError: the graph's inputs or outputs are not those of a decoder with these sizes.
    """

    def __init__(self, engine: Engine, sizes: DecoderSection) -> None:
        super().__init__(engine, sizes)
        self._last_index = np.zeros(sizes.max_sequences, np.int64)  # a step has one token a row: its index is always 0
        self._soft_tokens = np.zeros((1, sizes.hidden_size), np.float32)  # the graph wants a row; none is looked up
        self._check_graph()

    def prefill(self, first_row: int, prompts: Sequence[Prompt]) -> npt.NDArray[np.float32]:
        """See :meth:`RowDecoder.prefill`."""
        inputs = prefill_inputs(prompts)
        logits = np.empty((len(prompts), self.vocab_size), np.float32)
        self._bind(inputs, logits, first_row).run()
        return logits

    def _step_inputs(self, first_row: int, count: int) -> dict[str, Array]:
        return self._step.inputs(first_row, count) | {
            DECODER_IO.soft_tokens: self._soft_tokens,
            DECODER_IO.last_index: self._last_index[:count],
        }


class StepBuffers:
    """The small inputs and the logits of a decode step, allocated once for all rows and reused at every step."""

    def __init__(self, sizes: DecoderSection) -> None:
        rows = sizes.max_sequences
        self.input_ids = np.zeros((rows, 1), np.int64)
        self.position_ids = np.zeros((rows, 1), np.int64)
        self.seqlens_k = np.zeros(rows, np.int32)
        self.total_sequence_length = np.zeros((), np.int32)
        self.logits = np.empty((rows, sizes.vocab_size), np.float32)

    def inputs(self, first_row: int, count: int) -> dict[str, Array]:
        """Views of rows ``first_row .. first_row + count - 1``, by the graph's names."""
        rows = slice(first_row, first_row + count)
        return {
            DECODER_IO.input_ids: self.input_ids[rows],
            DECODER_IO.position_ids: self.position_ids[rows],
            DECODER_IO.seqlens_k: self.seqlens_k[rows],
            DECODER_IO.total_sequence_length: self.total_sequence_length,
        }

    def fill(self, first_row: int, token_ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> None:
        """Write the inputs of a step that appends ``token_ids`` (n,) to rows that hold ``lengths`` (n,) tokens."""
        rows = slice(first_row, first_row + len(token_ids))
        self.input_ids[rows, 0] = token_ids
        self.position_ids[rows, 0] = lengths
        self.seqlens_k[rows] = lengths
        self.total_sequence_length[...] = lengths.max() + 1


def prefill_inputs(prompts: Sequence[Prompt]) -> dict[str, Array]:
    """Inputs of one prefill of B prompts, padded on the right to the longest of S tokens, by the graph's names."""
    input_ids, soft_tokens, lengths = pack_prompts(prompts)
    longest = input_ids.shape[1]
    return {
        DECODER_IO.input_ids: input_ids,
        DECODER_IO.soft_tokens: soft_tokens,
        DECODER_IO.position_ids: np.tile(np.arange(longest, dtype=np.int64), (len(prompts), 1)),  # (B, S)
        DECODER_IO.last_index: lengths - 1,
        DECODER_IO.seqlens_k: (lengths - 1).astype(np.int32),
        DECODER_IO.total_sequence_length: np.array(longest, np.int32),
    }


def pack_prompts(
    prompts: Sequence[Prompt],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Ids (B, S) padded on the right, in which -(1 + k) stands for soft token k; all soft tokens (N, D); lengths (B,).

    N is 1 at least, as the graphs want it.
    """
    lengths = np.array([prompt.num_tokens for prompt in prompts], np.int64)
    input_ids = np.zeros((len(prompts), int(lengths.max())), np.int64)
    first_soft = 0
    for row, prompt in enumerate(prompts):
        num_soft = len(prompt.soft_tokens)
        input_ids[row, :num_soft] = -1 - np.arange(first_soft, first_soft + num_soft)
        input_ids[row, num_soft : lengths[row]] = prompt.token_ids
        first_soft += num_soft
    return input_ids, np.concatenate([prompt.soft_tokens for prompt in prompts], dtype=np.float32), lengths


def _declared(tensors: dict[str, Array], infos: tuple[TensorInfo, ...]) -> dict[str, Array]:
    """Those that the graph has: an engine may do without some (:meth:`~blipstream.contract.DecoderIO.optional`)."""
    return {info.name: tensors[info.name] for info in infos if info.name in tensors}


def check_tensors(engine: Engine, wanted: set[str], what: str, optional: frozenset[str] = frozenset()) -> None:
    """Raise :class:`EngineError` unless the graph's inputs and outputs have the names that are wanted.

    Those of ``optional`` may be missing.
    """
    found = {info.name for info in (*engine.inputs, *engine.outputs)}
    if not wanted - optional <= found <= wanted:
        lacks = ", ".join(sorted(wanted - optional - found)) or "nothing"
        extra = ", ".join(sorted(found - wanted)) or "nothing"
        raise EngineError(f"{engine.name} is not {what}: it lacks {lacks} and has {extra} besides")
