"""An encoder-decoder language model, as the decode loop needs it.

A prefill runs the encoder on whole prompts, keeps the keys and values that it gives for the decoder's cross-attention
in rows of a second cache, and then steps the decoder once, from the start token. Every later step is one run of the
decoder, which reads of each row of the second cache what is valid and writes nothing new into it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from blipstream.contract import DECODER_IO, ENCODER_IO
from blipstream.decoding.logits import Logits
from blipstream.decoding.request import Prompt
from blipstream.engines.base import Engine
from blipstream.engines.cache import CacheShape, KVCache
from blipstream.engines.decoder import RowDecoder, check_tensors, pack_prompts
from blipstream.engines.memory import Array, Tensor
from blipstream.errors import EngineError
from blipstream.manifest import DecoderSection


class EncoderDecoder(RowDecoder):
    """The :class:`~blipstream.decoding.request.Decoder` of a bundle whose language model has an encoder.

    It owns both engines and both caches.

    Args:
        encoder: the encoder's graph.
        decoder: the decoder's graph.
        sizes: the model's sizes and the caches' capacities, from the manifest.

    Raises:
        EngineError: a graph's inputs or outputs are not those of such a model, or the sizes have no encoder.
    """

    def __init__(self, encoder: Engine, decoder: Engine, sizes: DecoderSection) -> None:
        if sizes.encoder is None:
            raise EngineError(f"{encoder.name} was given for a language model of kind {sizes.family}, without encoder")
        super().__init__(decoder, sizes)
        self._encoder = encoder
        self._start_token_id = sizes.encoder.decoder_start_token_id
        heads, tokens = sizes.encoder.num_heads, sizes.encoder.max_tokens
        self._cross_shape = CacheShape(sizes.num_layers, sizes.max_sequences, heads, tokens, sizes.encoder.head_dim)
        self._cross_cache = decoder.allocate_cache(DECODER_IO.cross_inputs(sizes.num_layers)[0], self._cross_shape)
        self._cross_seqlens_k = decoder.allocate_host((sizes.max_sequences,), np.int32)
        self._cross_total_sequence_length = decoder.allocate_host((), np.int32)
        self._encoder_outputs = ENCODER_IO.outputs(sizes.num_layers)
        self._check_graph()
        wanted = {ENCODER_IO.input_ids, ENCODER_IO.soft_tokens, ENCODER_IO.lengths, *self._encoder_outputs}
        check_tensors(encoder, wanted, f"an encoder for a decoder of {sizes.num_layers} layers")

    def prefill(self, first_row: int, prompts: Sequence[Prompt]) -> Logits:
        """See :meth:`RowDecoder.prefill`."""
        self._encode(first_row, prompts)
        count = len(prompts)
        step = self._bind(self._step_inputs(first_row, count), first_row, count)
        self._fill_step(first_row, np.full(count, self._start_token_id, np.int64), np.zeros(count, np.int64))
        step.run()
        return self._logits.read(first_row, count)

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy row ``source``, which holds ``length`` tokens, and its prompt over row ``target``."""
        super().move_row(source, target, length)
        self._cross_cache.move_row(source, target, int(self._cross_seqlens_k[source]) + 1)
        self._cross_seqlens_k[target] = self._cross_seqlens_k[source]

    def close(self) -> None:
        """Release both engines and the caches' bindings."""
        super().close()
        self._encoder.close()

    def _encode(self, first_row: int, prompts: Sequence[Prompt]) -> None:
        """Fill rows of the cross-attention's cache with what the encoder makes of the prompts."""
        input_ids, soft_tokens, lengths = pack_prompts(prompts)
        inputs: dict[str, Tensor] = {
            ENCODER_IO.input_ids: input_ids,
            ENCODER_IO.soft_tokens: soft_tokens,
            ENCODER_IO.lengths: lengths.astype(np.int32),
        }
        outputs = self._allocate_outputs(*input_ids.shape)
        self._encoder.bind(inputs, outputs).run()
        self._cross_cache.write(first_row, [outputs[name] for name in self._encoder_outputs])
        self._cross_seqlens_k[first_row : first_row + len(prompts)] = lengths - 1

    def _allocate_outputs(self, batch: int, length: int) -> dict[str, Tensor]:
        """Memory for the encoder's outputs (B, H, S, D)."""
        types = {info.name: info.dtype for info in self._encoder.outputs}
        shape = (batch, self._cross_shape.num_heads, length, self._cross_shape.head_dim)
        return {name: self._encoder.allocate(shape, types[name]) for name in self._encoder_outputs}

    def _step_inputs(self, first_row: int, count: int) -> dict[str, Array]:
        return self._step.inputs(first_row, count) | {
            DECODER_IO.cross_seqlens_k: self._cross_seqlens_k[first_row : first_row + count],
            DECODER_IO.cross_total_sequence_length: self._cross_total_sequence_length,
        }

    def _fill_step(self, first_row: int, token_ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> None:
        super()._fill_step(first_row, token_ids, lengths)
        longest = self._cross_seqlens_k[first_row : first_row + len(token_ids)].max() + 1
        self._cross_total_sequence_length[...] = longest

    def _caches(self) -> list[tuple[KVCache, list[str], list[str]]]:
        num_layers = self._sizes.num_layers
        cross = (self._cross_cache, DECODER_IO.cross_inputs(num_layers), DECODER_IO.cross_outputs(num_layers))
        return [*super()._caches(), cross]
