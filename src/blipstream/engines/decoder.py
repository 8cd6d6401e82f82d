"""A decoder graph and its KV cache, as the decode loop needs them.

The graph is the one that :mod:`blipstream.contract` declares. It updates its caches in place: the ``past`` and
``present`` tensors of a run are bound to the same memory, rows 0..n-1 for a decode step, the rows behind the running
sequences for a prefill. Nothing is gathered and nothing is copied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt

from blipstream.contract import DECODER_IO
from blipstream.decoding.logits import DeviceLogits, Logits
from blipstream.decoding.request import Prompt
from blipstream.engines.base import BoundRun, Engine, TensorInfo
from blipstream.engines.cache import CacheShape, HostKVCache, KVCache
from blipstream.engines.memory import Array, Tensor, rows_of
from blipstream.engines.prefix import PrefixCache, prefix_key
from blipstream.errors import EngineError
from blipstream.manifest import DecoderSection

LARGE = 4_000_000
"""Layers times the square of their width, from which on a run's time is that of its weights or its tokens (OPT-125M has
7 million): with fewer, prompts that come together are quicker together, whatever is known of them."""


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
        heads, tokens = sizes.num_key_value_heads, sizes.max_tokens
        self._cache = engine.allocate_cache(
            DECODER_IO.cache_inputs(sizes.num_layers)[0],
            CacheShape(sizes.num_layers, sizes.max_sequences, heads, tokens, sizes.head_dim),
        )
        self._step = StepBuffers(sizes, engine.allocate_host)
        self._logits = LogitsBuffer(engine, sizes)
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
    def prefill(self, first_row: int, prompts: Sequence[Prompt]) -> Logits:
        """Fill rows ``first_row ..`` with the prompts, all at once; return the logits (B, V) that follow each.

        They lie in the decoder's own buffer: the next call overwrites them.

        Raises:
            EngineError: a graph failed; the rows' contents are undefined.
        """

    def decode(self, token_ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> Logits:
        """Append token ``token_ids[i]`` to row i, which holds ``lengths[i]`` tokens; return the logits (n, V).

        They lie in the decoder's own buffer: the next call overwrites them.

        Raises:
            EngineError: the graph failed; the rows' contents are undefined.
        """
        count = len(token_ids)
        if count not in self._steps:  # binding the cache costs more than the rest of a step's preparation: once each n
            self._steps[count] = self._bind(self._step_inputs(0, count), 0, count)
        self._fill_step(0, token_ids, lengths)
        self._steps[count].run()
        return self._logits.read(0, count)

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy row ``source``, which holds ``length`` tokens, over row ``target``."""
        self._cache.move_row(source, target, length)

    def close(self) -> None:
        """Release the engine and the cache's bindings."""
        self._steps.clear()
        self._engine.close()

    def prefix_gauges(self) -> dict[str, float]:
        """Values of the prefix cache's metrics: none where there is no such cache."""
        return {}

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

    def _bind(self, inputs: dict[str, Array], first_row: int, count: int) -> BoundRun:
        """A run of ``count`` rows from ``first_row`` on, whose logits :meth:`LogitsBuffer.read` gives."""
        bound: dict[str, Tensor] = dict(inputs)
        outputs = self._logits.outputs(first_row, count)
        for cache, input_names, output_names in self._caches():
            rows = cache.rows(first_row, count)
            bound |= dict(zip(input_names, rows, strict=True))
            outputs |= dict(zip(output_names, rows, strict=True))
        return self._engine.bind(_declared(bound, self._engine.inputs), _declared(outputs, self._engine.outputs))

    def _check_graph(self) -> None:
        """Raise unless the graph has the inputs and outputs of such a decoder."""
        wanted = {*self._step_inputs(0, 1), *self._logits.outputs(0, 1)}
        for _, input_names, output_names in self._caches():
            wanted.update(input_names, output_names)
        optional = DECODER_IO.optional(self._sizes.num_layers)
        check_tensors(self._engine, wanted, f"a decoder of {self._sizes.num_layers} layers", optional)


class CachedDecoder(RowDecoder):
    """A decoder-only language model: the :class:`~blipstream.decoding.request.Decoder` of most bundles.

    Args:
        engine: the decoder's graph.
        sizes: the model's sizes and the cache's capacity, from the manifest.
        prefix_bytes: budget of the prefixes that are kept (:mod:`blipstream.engines.prefix`).

    Raises:
        EngineError: the graph's inputs or outputs are not those of a decoder with these sizes.
    """

    def __init__(self, engine: Engine, sizes: DecoderSection, prefix_bytes: int = 0) -> None:
        super().__init__(engine, sizes)
        # On a GPU a prefill reads the weights anyway, and a few more tokens cost next to nothing.
        self._prefixes: PrefixCache | None = None
        if prefix_bytes and isinstance(self._cache, HostKVCache):
            self._prefixes = PrefixCache(self._cache, prefix_bytes)
        self._is_large = sizes.num_layers * sizes.hidden_size**2 >= LARGE
        # A step has one token a row, so that its index is always 0; and of the soft tokens, of which the graph wants a
        # row, it looks up none.
        self._last_index = engine.allocate_host((sizes.max_sequences,), np.int64)
        self._soft_tokens = engine.allocate_host((1, sizes.hidden_size), np.float32)
        self._check_graph()

    def prefill(self, first_row: int, prompts: Sequence[Prompt]) -> Logits:
        """See :meth:`RowDecoder.prefill`.

        Neighbours whose soft tokens are new are filled in together. Each of the others goes on behind what is known of
        its soft tokens, alone, as the graph wants it: to read all weights costs less than an image's tokens, unless
        the model is so small that both are little beside starting a run.
        """
        if self._prefixes is None:
            self._read(first_row, prompts)
        else:
            self._read_sharing(first_row, prompts, self._prefixes)
        return self._logits.read(first_row, len(prompts))

    def _read(self, first_row: int, prompts: Sequence[Prompt]) -> None:
        """Fill rows ``first_row ..`` with whole prompts, all at once."""
        self._bind(prefill_inputs(prompts), first_row, len(prompts)).run()

    def _read_sharing(self, first_row: int, prompts: Sequence[Prompt], prefixes: PrefixCache) -> None:
        """The same, without what is known of them, which is kept for the next."""
        keys = [prefix_key(prompt.soft_tokens) for prompt in prompts]
        known = prefixes.find(keys) if len(prompts) == 1 or self._is_large else frozenset()

        def read(part: slice) -> None:
            self._read(first_row + part.start, prompts[part])
            prefixes.keep(first_row + part.start, prompts[part], keys[part])

        for is_known, group in groupby(range(len(prompts)), known.__contains__):
            if not is_known:
                rows = list(group)
                read(slice(rows[0], rows[-1] + 1))
        for row in sorted(known):
            if prefixes.restore(first_row + row, keys[row]):
                self._bind(self._continuation(prompts[row]), first_row + row, 1).run()
            else:  # dropped since, to make room for others of this call
                read(slice(row, row + 1))

    def prefix_gauges(self) -> dict[str, float]:
        """See :meth:`RowDecoder.prefix_gauges`."""
        return {} if self._prefixes is None else self._prefixes.gauges()

    def _continuation(self, prompt: Prompt) -> dict[str, Array]:
        """Inputs of a run that appends a prompt's text to a row that holds its soft tokens."""
        start, count = len(prompt.soft_tokens), len(prompt.token_ids)
        return {
            DECODER_IO.input_ids: np.array([prompt.token_ids], np.int64),
            DECODER_IO.soft_tokens: self._soft_tokens,
            DECODER_IO.position_ids: np.arange(start, start + count, dtype=np.int64)[None],
            DECODER_IO.last_index: np.array([count - 1], np.int64),
            DECODER_IO.seqlens_k: np.array([start + count - 1], np.int32),
            DECODER_IO.total_sequence_length: np.array(start + count, np.int32),
        }

    def _step_inputs(self, first_row: int, count: int) -> dict[str, Array]:
        return self._step.inputs(first_row, count) | {
            DECODER_IO.soft_tokens: self._soft_tokens,
            DECODER_IO.last_index: self._last_index[:count],
        }


class StepBuffers:
    """The small inputs of a decode step, allocated once for all rows and reused at every step."""

    def __init__(self, sizes: DecoderSection, allocate: Callable[[Sequence[int], npt.DTypeLike], Array]) -> None:
        rows = sizes.max_sequences
        self.input_ids = allocate((rows, 1), np.int64)
        self.position_ids = allocate((rows, 1), np.int64)
        self.seqlens_k = allocate((rows,), np.int32)
        self.total_sequence_length = allocate((), np.int32)

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


class LogitsBuffer:
    """The logits of all rows: in the host's memory, or on the device, if the graph says there what is wanted of them.

    Args:
        engine: the decoder's graph.
        sizes: the model's sizes and the cache's capacity.
    """

    def __init__(self, engine: Engine, sizes: DecoderSection) -> None:
        shape = (sizes.max_sequences, sizes.vocab_size)
        self._engine = engine
        self._host = engine.allocate_host(shape, np.float32)
        self._buffers: dict[str, Tensor] = {DECODER_IO.logits: self._host}
        self._reduced = any(info.name == DECODER_IO.argmax for info in engine.outputs)
        if self._reduced:
            self._argmax = engine.allocate_host(shape[:1], np.int64)
            self._sums = engine.allocate_host(shape[:1], np.float32)
            self._buffers[DECODER_IO.logits] = engine.allocate(shape, np.float32)
            self._buffers |= {DECODER_IO.argmax: self._argmax, DECODER_IO.sums: self._sums}

    def outputs(self, first_row: int, count: int) -> dict[str, Tensor]:
        """What a run of these rows writes, by the graph's names."""
        return {name: rows_of(buffer, first_row, count) for name, buffer in self._buffers.items()}

    def read(self, first_row: int, count: int) -> Logits:
        """What a run of these rows has written; the next run overwrites it."""
        rows = slice(first_row, first_row + count)
        if not self._reduced:
            logits: npt.NDArray[np.float32] = self._host[rows]
            return logits
        return DeviceLogits(self._argmax[rows], self._sums[rows], lambda row: self._fetch(first_row + row))

    def _fetch(self, row: int) -> npt.NDArray[np.float32]:
        target: npt.NDArray[np.float32] = self._host[row]
        self._engine.copy_to_host(rows_of(self._buffers[DECODER_IO.logits], row, 1), target[None])
        return target


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


def _declared(tensors: dict[str, Tensor], infos: tuple[TensorInfo, ...]) -> dict[str, Tensor]:
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
