"""Do the graphs of a bundle compute what the checkpoint computes? Measured on the engines that will serve it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blipstream.contract import (
    BLIP2,
    GRAPH_FILE,
    IMAGE_EMBEDS,
    MODEL_VERSION,
    PARITY_FILE,
    PIXEL_VALUES,
    QFORMER,
    SOFT_TOKENS,
    TOKENIZER_FILE,
    VISION_ENCODER,
    Manifest,
)
from blipstream.decoding.loop import DecodeLoop, LoopConfig
from blipstream.decoding.request import Chunk, Decoder, GenerationRequest, SamplingParams, prefilled_tokens
from blipstream.decoding.text import Tokenizer
from blipstream.engines import create_engine, load_decoder
from blipstream.errors import ParityError
from blipstream.instructions import instruction_inputs, pad_instructions
from blipstream.preprocess import ImageTransform
from blipstream_export.reference import Floats, Reference, SampleText, sample_prompt

PREPROCESS_STAGE, PREFILL_STAGE, STEP_STAGE = "preprocess", "decoder prefill", "decoder step"


@dataclass(frozen=True)
class Thresholds:
    """What a bundle in fp32 must reach, on every sample."""

    min_cosine: float = 0.99999
    """Cosine between a stage's output and the checkpoint's, for the worst row."""
    max_relative_difference: float = 1e-3
    """Largest absolute difference, relative to the largest absolute value of the checkpoint's output."""
    tie: float = 1e-4
    """Two tokens whose logits differ by less than this in the checkpoint itself, relative to its largest logit, may
    change places: rounding decides between them."""


@dataclass(frozen=True)
class StageParity:
    """How close one stage comes to the checkpoint, given the checkpoint's own inputs."""

    stage: str
    cosine: float
    """Of the worst row."""
    max_difference: float
    """Largest absolute difference."""
    max_reference: float
    """Largest absolute value of the checkpoint's output."""


@dataclass(frozen=True)
class TextParity:
    """One sample from image file to greedy tokens, all stages in a row, all samples in flight together."""

    image: int
    """Index of its image, or of its first frame."""
    prompt: str
    expected: tuple[int, ...]
    found: tuple[int, ...]
    equal: bool
    """Token for token, or different from a tie on."""


@dataclass(frozen=True)
class ParityReport:
    """Contents of ``parity.json``."""

    thresholds: Thresholds
    stages: tuple[StageParity, ...]
    texts: tuple[TextParity, ...]

    @property
    def faults(self) -> list[str]:
        """What misses its threshold, one phrase each."""
        limits = self.thresholds
        faults = []
        for stage in self.stages:
            if not stage.cosine >= limits.min_cosine:  # also true of NaN
                faults.append(f"{stage.stage} has cosine {stage.cosine:.7f}, and {limits.min_cosine} is asked for")
            elif not stage.max_difference <= limits.max_relative_difference * stage.max_reference:
                faults.append(
                    f"{stage.stage} differs by {stage.max_difference:.2g} where values reach {stage.max_reference:.2g}"
                )
        wrong = [text for text in self.texts if not text.equal]
        if wrong:
            faults.append(
                f"{len(wrong)} of {len(self.texts)} greedy texts differ (image {wrong[0].image}, prompt "
                f"{wrong[0].prompt!r}: expected {list(wrong[0].expected)}, found {list(wrong[0].found)})"
            )
        return faults

    def check(self) -> None:
        """Raise unless every threshold is met.

        Raises:
            ParityError: the message lists all that is missed.
        """
        if self.faults:
            raise ParityError(f"the exported graphs do not reproduce the checkpoint: {'; '.join(self.faults)}")

    def dump(self, bundle: Path) -> None:
        """Write ``parity.json`` into a bundle."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (bundle / PARITY_FILE).write_text(text + "\n", encoding="utf-8")


def measure(
    bundle: Path, manifest: Manifest, reference: Reference, thresholds: Thresholds, *, threads: int | None = None
) -> ParityReport:
    """Run every graph of the bundle on the reference's samples."""
    pixel_values = np.stack([ImageTransform(manifest.image)(image) for image in reference.images])
    engine = manifest.engine
    with (
        create_engine(engine, bundle / VISION_ENCODER / MODEL_VERSION / GRAPH_FILE, threads=threads) as vision,
        create_engine(engine, bundle / QFORMER / MODEL_VERSION / GRAPH_FILE, threads=threads) as qformer,
    ):
        image_embeds = vision.run({PIXEL_VALUES.name: reference.pixel_values})[IMAGE_EMBEDS.name]
        served_embeds = vision.run({PIXEL_VALUES.name: pixel_values})[IMAGE_EMBEDS.name]
        soft_tokens, served = (
            qformer.run(_qformer_inputs(embeds, reference, manifest))[SOFT_TOKENS.name]
            for embeds in (reference.image_embeds, served_embeds)
        )
    folder = bundle / BLIP2 / MODEL_VERSION
    decoder = load_decoder(manifest.decoder, lambda file: create_engine(engine, folder / file, threads=threads))
    try:
        stages = (
            compare(PREPROCESS_STAGE, pixel_values, reference.pixel_values),
            compare(VISION_ENCODER, image_embeds, reference.image_embeds),
            compare(QFORMER, soft_tokens, np.stack([reading.soft_tokens for reading in reference.readings])),
            *_compare_decoder(decoder, reference),
        )
        found = _serve(decoder, manifest, folder / TOKENIZER_FILE, served, reference.texts)
    finally:
        decoder.close()
    texts = tuple(
        TextParity(text.images[0], text.prompt, text.token_ids, tokens, _same_tokens(text, tokens, thresholds.tie))
        for text, tokens in zip(reference.texts, found, strict=True)
    )
    return ParityReport(thresholds, stages, texts)


def _qformer_inputs(image_embeds: Floats, reference: Reference, manifest: Manifest) -> dict[str, Any]:
    """All readings as one batch, with their instructions of unequal lengths where it reads them."""
    readings = reference.readings
    inputs: dict[str, Any] = {IMAGE_EMBEDS.name: image_embeds[[reading.image for reading in readings]]}
    if manifest.qformer.instruction is not None:
        instructions = [instruction_inputs(reading.instruction or ()) for reading in readings]
        inputs |= pad_instructions(instructions, manifest.qformer.instruction)
    return inputs


def compare(stage: str, found: Floats, expected: Floats) -> StageParity:
    """Compare two outputs (..., width); the cosine is that of the worst row.

    Figures are rounded to what is meaningful in fp32, so that a report does not change with the last bit.
    """
    a = found.reshape(-1, found.shape[-1]).astype(np.float64)
    b = expected.reshape(-1, expected.shape[-1]).astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    with np.errstate(invalid="ignore"):  # rows of zeros are equal or not, and have no cosine
        cosines = np.where(norms == 0, (a == b).all(1), (a * b).sum(1) / norms)
    return StageParity(
        stage,
        cosine=round(float(cosines.min()), 7),
        max_difference=float(f"{np.abs(a - b).max():.2g}"),
        max_reference=float(f"{np.abs(b).max():.3g}"),
    )


def _compare_decoder(decoder: Decoder, reference: Reference) -> list[StageParity]:
    """Logits of prefill and decode steps, rows of unequal lengths together, fed with the checkpoint's tokens."""
    prefill: list[tuple[Floats, Floats]] = []
    steps: list[tuple[Floats, Floats]] = []
    texts = reference.texts
    for first in range(0, len(texts), decoder.max_sequences):
        group = sorted(texts[first : first + decoder.max_sequences], key=lambda text: -len(text.token_ids))
        prompts = [reference.prompt(text) for text in group]
        prefilled = [prefilled_tokens(prompt, decoder.decoder_start_token_id) for prompt in prompts]
        prefill.append((decoder.prefill(0, prompts).copy(), np.stack([text.logits[0] for text in group])))
        for step in range(1, len(group[0].token_ids)):
            going = [text for text in group if len(text.token_ids) > step]  # the longest first: rows stay 0..n-1
            tokens = np.array([text.token_ids[step - 1] for text in going], np.int64)
            lengths = np.array(prefilled[: len(going)], np.int64) + step - 1
            steps.append((decoder.decode(tokens, lengths).copy(), np.stack([text.logits[step] for text in going])))
    return [_compare_all(PREFILL_STAGE, prefill), *([_compare_all(STEP_STAGE, steps)] if steps else [])]


def _compare_all(stage: str, pairs: Sequence[tuple[Floats, Floats]]) -> StageParity:
    return compare(stage, np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs]))


def _serve(
    decoder: Decoder, manifest: Manifest, tokenizer: Path, soft_tokens: Floats, texts: Sequence[SampleText]
) -> list[tuple[int, ...]]:
    """Greedy tokens of all samples by the decode loop that serves them; its budget makes them join in turn."""
    loop = DecodeLoop(
        decoder,
        Tokenizer.load(tokenizer),
        eos_token_ids=manifest.generation.eos_token_ids,
        config=LoopConfig(prefill_budget=2 * (manifest.qformer.num_query_tokens + 8)),
    )
    chunks: list[list[Chunk]] = [[] for _ in texts]
    for index, text in enumerate(texts):
        loop.submit(
            GenerationRequest(
                request_id=str(index),
                prompt=sample_prompt(text, list(soft_tokens)),
                params=SamplingParams(max_tokens=len(text.token_ids)),
                on_chunk=chunks[index].append,
            )
        )
    loop.close()  # drains: returns when every text is complete
    for answer in chunks:
        if answer[-1].error is not None:
            raise answer[-1].error
    return [tuple(token for chunk in answer for token in chunk.token_ids) for answer in chunks]


def _same_tokens(expected: SampleText, found: Sequence[int], tie: float) -> bool:
    for step, token in enumerate(expected.token_ids):
        if step >= len(found):
            return False
        if found[step] != token:
            logits = expected.logits[step]
            return bool(logits[token] - logits[found[step]] <= tie * np.abs(logits).max())
    return len(found) == len(expected.token_ids)
