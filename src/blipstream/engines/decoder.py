"""A decoder graph and its KV cache, as the decode loop needs them.

The graph is the one that :mod:`blipstream.contract` declares. It updates the cache in place: the ``past`` and
``present`` tensors of a run are bound to the same memory, rows 0..n-1 for a decode step, the rows behind the running
sequences for a prefill. Nothing is gathered and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from blipstream.contract import DECODER_IO, DecoderSection
from blipstream.decoding.request import Prompt
from blipstream.engines.base import Array, BoundRun, Engine
from blipstream.errors import EngineError


class CachedDecoder:
    """The :class:`~blipstream.decoding.request.Decoder` of a bundle. It owns its engine and its cache.

    Args:
        engine: the decoder's graph.
        sizes: the model's sizes and the cache's capacity, from the manifest.

    Raises:
        EngineError: the graph's inputs or outputs are not those of a decoder with these sizes.
    """

    def __init__(self, engine: Engine, sizes: DecoderSection) -> None:
        _check_graph(engine, sizes.num_layers)
        self._engine = engine
        self._sizes = sizes
        self._cache = engine.allocate_cache(
            num_layers=sizes.num_layers,
            num_rows=sizes.max_sequences,
            num_heads=sizes.num_key_value_heads,
            max_tokens=sizes.max_tokens,
            head_dim=sizes.head_dim,
        )
        self._cache_inputs = DECODER_IO.cache_inputs(sizes.num_layers)
        self._cache_outputs = DECODER_IO.cache_outputs(sizes.num_layers)
        self._step = _StepBuffers(sizes)
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
    def vocab_size(self) -> int:
        """Width V of the logits."""
        return self._sizes.vocab_size

    def prefill(self, first_row: int, prompts: Sequence[Prompt]) -> npt.NDArray[np.float32]:
        """Fill rows ``first_row ..`` with the prompts, all in one run; return the logits (B, V) that follow each.

        Raises:
            EngineError: the graph failed; the rows' contents are undefined.
        """
        inputs = prefill_inputs(prompts)
        logits = np.empty((len(prompts), self.vocab_size), np.float32)
        self._bind(inputs, logits, first_row).run()
        return logits

    def decode(self, token_ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Append token ``token_ids[i]`` to row i, which holds ``lengths[i]`` tokens; return the logits (n, V).

        The logits are a view of the decoder's own buffer: the next call overwrites them.

        Raises:
            EngineError: the graph failed; the rows' contents are undefined.
        """
        count = len(token_ids)
        if count not in self._steps:  # binding the cache costs more than the rest of a step's preparation: once each n
            self._steps[count] = self._bind(self._step.inputs(count), self._step.logits[:count], 0)
        self._step.fill(token_ids, lengths)
        self._steps[count].run()
        return self._step.logits[:count]

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of row ``source`` over row ``target``."""
        self._cache.move_row(source, target, length)

    def close(self) -> None:
        """Release the engine and the cache's bindings."""
        self._steps.clear()
        self._engine.close()

    def _bind(self, inputs: dict[str, Array], logits: npt.NDArray[np.float32], first_row: int) -> BoundRun:
        rows = self._cache.rows(first_row, len(logits))
        return self._engine.bind(
            inputs={**inputs, **dict(zip(self._cache_inputs, rows, strict=True))},
            outputs={DECODER_IO.logits: logits, **dict(zip(self._cache_outputs, rows, strict=True))},
        )


class _StepBuffers:
    """The small inputs and the logits of a decode step, allocated once for all rows and reused at every step."""

    def __init__(self, sizes: DecoderSection) -> None:
        rows = sizes.max_sequences
        self.input_ids = np.zeros((rows, 1), np.int64)
        self.position_ids = np.zeros((rows, 1), np.int64)
        self.seqlens_k = np.zeros(rows, np.int32)
        self.total_sequence_length = np.zeros((), np.int32)
        self.last_index = np.zeros(rows, np.int64)  # a step has one token a row: its index is always 0
        self.soft_tokens = np.zeros((1, sizes.hidden_size), np.float32)  # the graph wants one row; none is looked up
        self.logits = np.empty((rows, sizes.vocab_size), np.float32)

    def inputs(self, count: int) -> dict[str, Array]:
        """Views of the first ``count`` rows, by the graph's names."""
        return {
            DECODER_IO.input_ids: self.input_ids[:count],
            DECODER_IO.soft_tokens: self.soft_tokens,
            DECODER_IO.position_ids: self.position_ids[:count],
            DECODER_IO.last_index: self.last_index[:count],
            DECODER_IO.seqlens_k: self.seqlens_k[:count],
            DECODER_IO.total_sequence_length: self.total_sequence_length,
        }

    def fill(self, token_ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> None:
        """Write the inputs of a step that appends ``token_ids`` (n,) to rows that hold ``lengths`` (n,) tokens."""
        count = len(token_ids)
        self.input_ids[:count, 0] = token_ids
        self.position_ids[:count, 0] = lengths
        self.seqlens_k[:count] = lengths
        self.total_sequence_length[...] = lengths.max() + 1


def prefill_inputs(prompts: Sequence[Prompt]) -> dict[str, Array]:
    """Inputs of one prefill of B prompts, padded on the right to the longest of S tokens, by the graph's names."""
    lengths = np.array([prompt.num_tokens for prompt in prompts], np.int64)  # (B,)
    longest = int(lengths.max())
    input_ids = np.zeros((len(prompts), longest), np.int64)  # (B, S)
    first_soft = 0
    for row, prompt in enumerate(prompts):
        num_soft = len(prompt.soft_tokens)
        input_ids[row, :num_soft] = -1 - np.arange(first_soft, first_soft + num_soft)
        input_ids[row, num_soft : lengths[row]] = prompt.token_ids
        first_soft += num_soft
    return {
        DECODER_IO.input_ids: input_ids,
        DECODER_IO.soft_tokens: np.concatenate([prompt.soft_tokens for prompt in prompts], dtype=np.float32),  # (N, D)
        DECODER_IO.position_ids: np.tile(np.arange(longest, dtype=np.int64), (len(prompts), 1)),  # (B, S)
        DECODER_IO.last_index: lengths - 1,
        DECODER_IO.seqlens_k: (lengths - 1).astype(np.int32),
        DECODER_IO.total_sequence_length: np.array(longest, np.int32),
    }


def _check_graph(engine: Engine, num_layers: int) -> None:
    small = (
        DECODER_IO.input_ids,
        DECODER_IO.soft_tokens,
        DECODER_IO.position_ids,
        DECODER_IO.last_index,
        DECODER_IO.seqlens_k,
        DECODER_IO.total_sequence_length,
    )
    wanted = {*small, *DECODER_IO.cache_inputs(num_layers), DECODER_IO.logits, *DECODER_IO.cache_outputs(num_layers)}
    found = {info.name for info in (*engine.inputs, *engine.outputs)}
    if wanted != found:
        lacks = ", ".join(sorted(wanted - found)) or "nothing"
        extra = ", ".join(sorted(found - wanted)) or "nothing"
        raise EngineError(
            f"{engine.name} is not a decoder of {num_layers} layers: it lacks {lacks} and has {extra} besides"
        )
