"""What the graphs of a bundle read of the parity report's samples, by the names of their inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from blipstream.contract import DECODER_IO, ENCODER_IO, IMAGE_EMBEDS, PIXEL_VALUES, QFORMER, VISION_ENCODER
from blipstream.decoding.request import Prompt
from blipstream.engines.decoder import pack_prompts, prefill_inputs
from blipstream.instructions import instruction_inputs, pad_instructions
from blipstream.manifest import DecoderSection, InstructionSection
from blipstream_export.reference import Reading, Reference, SampleText

Feed = Mapping[str, Any]
"""Arrays for the inputs of a graph."""


@dataclass(frozen=True)
class GraphSamples:
    """Batches for each graph.

    Attributes:
        reference: the checkpoint's own outputs on the samples.
        sizes: of the language model.
        instruction: what the Q-Former reads of an instruction, if it does.
        max_batch: images, or instructions, that are read at once.
    """

    reference: Reference
    sizes: DecoderSection
    instruction: InstructionSection | None
    max_batch: int

    def feed(self, stage: str, graph: Path) -> Feed:
        """The first batch for a graph."""
        return next(self.feeds(stage, graph))

    def feeds(self, stage: str, graph: Path) -> Iterator[Feed]:
        """Inputs of a graph, batch by batch; a decoder-only language model reads whole texts, each as one prompt.

        A decoder behind an encoder takes its first step; what the encoder would have given to its cross-attention is
        drawn at random.
        """
        if stage == VISION_ENCODER:
            for pixel_values in _batches(self.reference.pixel_values, self.max_batch):
                yield {PIXEL_VALUES.name: pixel_values}
        elif stage == QFORMER:
            for readings in _batches(self.reference.readings, self.max_batch):
                yield self._readings(readings)
        else:
            inputs = {str(value.name): value for value in ir.load(graph).graph.inputs}
            for texts in self.text_batches():
                yield self._language_inputs(inputs, texts)

    def text_batches(self) -> Iterator[Sequence[SampleText]]:
        """All texts, as many at once as decode together."""
        return _batches(self.reference.texts, self.sizes.max_sequences)

    def _language_inputs(self, inputs: Mapping[str, ir.Value], texts: Sequence[SampleText]) -> Feed:
        found: dict[str, Any]
        if ENCODER_IO.lengths in inputs:
            prompts = [self.reference.prompt(text) for text in texts]
            input_ids, soft_tokens, lengths = pack_prompts(prompts)
            found = {
                ENCODER_IO.input_ids: input_ids,
                ENCODER_IO.soft_tokens: soft_tokens,
                ENCODER_IO.lengths: lengths.astype(np.int32),
            }
        elif self.sizes.encoder is not None:
            found = self._first_step(len(texts), self.sizes.encoder.decoder_start_token_id)
        else:
            found = dict(prefill_inputs(self._prompts(texts)))
        found |= self._caches(inputs, len(texts))
        return {name: found[name] for name in inputs}

    def _readings(self, readings: Sequence[Reading]) -> Feed:
        embeds = self.reference.image_embeds[[reading.image for reading in readings]]
        inputs: dict[str, Any] = {IMAGE_EMBEDS.name: embeds}
        if self.instruction is not None:
            instructions = [instruction_inputs(reading.instruction or ()) for reading in readings]
            inputs |= pad_instructions(instructions, self.instruction)
        return inputs

    def _prompts(self, texts: Sequence[SampleText]) -> list[Prompt]:
        """The texts' prompts, each with what the checkpoint answered as far as there is room."""
        prompts = []
        for text in texts:
            prompt = self.reference.prompt(text)
            room = self.sizes.max_prompt_tokens - prompt.num_tokens
            prompts.append(Prompt(prompt.soft_tokens, prompt.token_ids + text.token_ids[:room]))
        return prompts

    def _first_step(self, count: int, start_token_id: int) -> dict[str, Any]:
        """Inputs of the first step behind an encoder that has filled all of its rows."""
        return step_inputs([start_token_id] * count, 0) | {
            DECODER_IO.cross_seqlens_k: np.full(count, self.sizes.max_prompt_tokens - 1, np.int32),
            DECODER_IO.cross_total_sequence_length: np.array(self.sizes.max_prompt_tokens, np.int32),
        }

    def _caches(self, inputs: Mapping[str, ir.Value], batch: int) -> dict[str, Any]:
        """Empty caches, and what the cross-attention reads."""
        names = DECODER_IO.cache_inputs(self.sizes.num_layers)
        cross = DECODER_IO.cross_inputs(self.sizes.num_layers)
        rng = np.random.default_rng(0)
        caches = {}
        for name in (*names, *cross):
            if name not in inputs:
                continue
            value = inputs[name]
            assert value.shape is not None
            assert value.dtype is not None
            shape = (batch, *(int(size) for size in value.shape[1:]))  # type: ignore[arg-type]  # all but the first are fixed
            drawn = rng.standard_normal(shape) if name in cross else np.zeros(shape)
            caches[name] = drawn.astype(value.dtype.numpy())
        return caches


def step_inputs(token_ids: Sequence[int], length: int) -> dict[str, Any]:
    """The small inputs of a step that appends a token to each row, all of which hold ``length`` tokens."""
    count = len(token_ids)
    return {
        DECODER_IO.input_ids: np.array(token_ids, np.int64)[:, None],
        DECODER_IO.position_ids: np.full((count, 1), length, np.int64),
        DECODER_IO.seqlens_k: np.full(count, length, np.int32),
        DECODER_IO.total_sequence_length: np.array(length + 1, np.int32),
    }


def _batches(rows: Any, size: int) -> Iterator[Any]:
    """Slices of at most ``size`` rows."""
    return (rows[first : first + size] for first in range(0, len(rows), size))
