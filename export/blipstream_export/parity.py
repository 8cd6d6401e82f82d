"""Do the graphs of a bundle compute what the checkpoint computes? Measured on the engines that will serve it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blipstream.contract import (
    BLIP2,
    GRAPH_FILE,
    IMAGE_EMBEDS,
    MODEL_VERSION,
    PIXEL_VALUES,
    QFORMER,
    SOFT_TOKENS,
    TOKENIZER_FILE,
    VISION_ENCODER,
)
from blipstream.decoding.logits import Logits, reduced
from blipstream.decoding.loop import DecodeLoop, LoopConfig
from blipstream.decoding.request import Chunk, Decoder, GenerationRequest, SamplingParams, prefilled_tokens
from blipstream.decoding.text import Tokenizer
from blipstream.engines import Engine, load_decoder, open_engine
from blipstream.errors import ParityError
from blipstream.instructions import instruction_inputs, pad_instructions
from blipstream.manifest import PARITY_FILE, EngineName, Manifest, Precision
from blipstream.preprocess import ImageTransform
from blipstream_export.accuracy import Accuracy
from blipstream_export.precision import PRECISIONS, StagePrecisions
from blipstream_export.quantized_graph import LayerPrecision
from blipstream_export.reference import Floats, Reference, SampleText, sample_prompt

PREPROCESS_STAGE, PREFILL_STAGE, STEP_STAGE = "preprocess", "decoder prefill", "decoder step"


@dataclass(frozen=True)
class Thresholds:
    """What a stage must reach in one precision, on every sample."""

    min_cosine: float
    """Cosine between a stage's output and the checkpoint's, for the worst row."""
    max_relative_error: float
    """Length of the difference of all outputs, relative to the length of the checkpoint's."""
    min_agreement: float
    """Share of the checkpoint's greedy tokens that the bundle chooses as well, given those before them."""


THRESHOLDS: Mapping[Precision, Thresholds] = {
    "fp32": Thresholds(min_cosine=0.99999, max_relative_error=1e-3, min_agreement=1.0),
    "fp16": Thresholds(min_cosine=0.9999, max_relative_error=1e-2, min_agreement=0.95),
    "bf16": Thresholds(min_cosine=0.999, max_relative_error=5e-2, min_agreement=0.9),
    "int8": Thresholds(min_cosine=0.8, max_relative_error=0.1, min_agreement=0.85),
    "fp8": Thresholds(min_cosine=0.75, max_relative_error=0.2, min_agreement=0.75),  # three digits: 2.6 % of each input
    "int4": Thresholds(min_cosine=0.7, max_relative_error=0.3, min_agreement=0.6),
}
"""Of each precision. Agreement is asked of the whole bundle, by the loosest of its stages' precisions."""

COMPUTED_THRESHOLDS: Mapping[Precision, Thresholds] = {
    **THRESHOLDS,
    "fp16": Thresholds(min_cosine=0.999, max_relative_error=5e-2, min_agreement=0.9),
    "bf16": Thresholds(min_cosine=0.99, max_relative_error=0.15, min_agreement=0.85),
}
"""Of an engine that computes in half precision, where the CPU's stores in it: each layer rounds its results as well."""

TIE = 1e-4
"""Two tokens whose logits differ by less than this in the checkpoint itself, relative to its largest logit, may change
places: rounding decides between them."""


@dataclass(frozen=True)
class StageParity:
    """How close one stage comes to the checkpoint, given the checkpoint's own inputs."""

    stage: str
    precision: Precision
    cosine: float
    """Of the worst row."""
    relative_error: float
    """Length of the difference of all outputs, relative to the length of the checkpoint's."""
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

    thresholds: Mapping[Precision, Thresholds]
    """Of the precisions that the bundle uses."""
    streamed: bool
    """Whether the checkpoint was too large for memory, and was run weight by weight; it computes the same."""
    stages: tuple[StageParity, ...]
    agreement: float
    """Share of the checkpoint's greedy tokens that the bundle chooses, given the image and the tokens before them."""
    texts: tuple[TextParity, ...]
    accuracy: tuple[Accuracy, ...] = ()
    """On the user's test set, if there was one."""
    layers: tuple[LayerPrecision, ...] = ()
    """Of int8, fp8 and int4: how each matrix was quantized."""

    @property
    def faults(self) -> list[str]:
        """What misses its threshold, one phrase each."""
        faults = []
        for stage in self.stages:
            limits = self.thresholds[stage.precision]
            if not stage.cosine >= limits.min_cosine:  # also true of NaN
                faults.append(f"{stage.stage} has cosine {stage.cosine:.7f}, and {limits.min_cosine} is asked for")
            elif not stage.relative_error <= limits.max_relative_error:
                faults.append(
                    f"{stage.stage} has relative error {stage.relative_error:.2g}, and {limits.max_relative_error} is "
                    "allowed"
                )
        wrong = [text for text in self.texts if not text.equal]
        loosest = min(limits.min_agreement for limits in self.thresholds.values())
        if loosest == 1.0 and wrong:
            faults.append(
                f"{len(wrong)} of {len(self.texts)} greedy texts differ (image {wrong[0].image}, prompt "
                f"{wrong[0].prompt!r}: expected {list(wrong[0].expected)}, found {list(wrong[0].found)})"
            )
        elif not self.agreement >= loosest:
            faults.append(f"{self.agreement:.1%} of the greedy tokens agree, and {loosest:.0%} is asked for")
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


def thresholds_of(engine: EngineName) -> Mapping[Precision, Thresholds]:
    """What the stages of a bundle for ``engine`` must reach."""
    return THRESHOLDS if engine == "onnxruntime" else COMPUTED_THRESHOLDS


def measure(
    bundle: Path,
    manifest: Manifest,
    reference: Reference,
    thresholds: Mapping[Precision, Thresholds] = THRESHOLDS,
    *,
    threads: int | None = None,
) -> ParityReport:
    """Run every graph of the bundle on the reference's samples."""
    pixel_values = np.stack([ImageTransform(manifest.image)(image) for image in reference.images])
    precisions = StagePrecisions(**manifest.precision)
    with (
        open_engine(manifest, bundle / VISION_ENCODER / MODEL_VERSION, GRAPH_FILE, threads=threads) as vision,
        open_engine(manifest, bundle / QFORMER / MODEL_VERSION, GRAPH_FILE, threads=threads) as qformer,
    ):
        image_embeds, served_embeds = (
            _run(vision, {PIXEL_VALUES.name: pixels}, manifest.max_batch)[IMAGE_EMBEDS.name]
            for pixels in (reference.pixel_values, pixel_values)
        )
        soft_tokens, served = (
            _run(qformer, _qformer_inputs(embeds, reference, manifest), manifest.max_batch)[SOFT_TOKENS.name]
            for embeds in (reference.image_embeds, served_embeds)
        )
    expected = np.stack([reading.soft_tokens for reading in reference.readings])
    folder = bundle / BLIP2 / MODEL_VERSION
    decoder = load_decoder(manifest.decoder, lambda file: open_engine(manifest, folder, file, threads=threads))
    try:
        stages = (
            compare(PREPROCESS_STAGE, "fp32", pixel_values, reference.pixel_values),
            compare(VISION_ENCODER, precisions.vision_encoder, image_embeds, reference.image_embeds),
            compare(QFORMER, precisions.qformer, soft_tokens, expected),
            *_compare_decoder(decoder, precisions.decoder, reference.texts, expected),
        )
        agreement = _agreement(decoder, reference.texts, served)
        found = _serve(decoder, manifest, folder / TOKENIZER_FILE, served, reference.texts)
    finally:
        decoder.close()
    texts = tuple(
        TextParity(text.images[0], text.prompt, text.token_ids, tokens, _same_tokens(text, tokens))
        for text, tokens in zip(reference.texts, found, strict=True)
    )
    used = {precision: thresholds[precision] for precision in PRECISIONS if precision in manifest.precision.values()}
    return ParityReport({"fp32": thresholds["fp32"], **used}, reference.streamed, stages, agreement, texts)


def _run(engine: Engine, inputs: Mapping[str, Any], max_batch: int) -> dict[str, Any]:
    """Run a graph on more rows than it takes at once."""
    count = len(next(iter(inputs.values())))
    parts = [
        engine.run({name: array[first : first + max_batch] for name, array in inputs.items()})
        for first in range(0, count, max_batch)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _qformer_inputs(image_embeds: Floats, reference: Reference, manifest: Manifest) -> dict[str, Any]:
    """All readings as one batch, with their instructions of unequal lengths where it reads them."""
    readings = reference.readings
    inputs: dict[str, Any] = {IMAGE_EMBEDS.name: image_embeds[[reading.image for reading in readings]]}
    if manifest.qformer.instruction is not None:
        instructions = [instruction_inputs(reading.instruction or ()) for reading in readings]
        inputs |= pad_instructions(instructions, manifest.qformer.instruction)
    return inputs


def compare(stage: str, precision: Precision, found: Floats, expected: Floats) -> StageParity:
    """Compare two outputs (..., width); the cosine is that of the worst row.

    Figures are rounded to what is meaningful in fp32, so that a report does not change with the last bit.
    """
    a = found.reshape(-1, found.shape[-1]).astype(np.float64)
    b = expected.reshape(-1, expected.shape[-1]).astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    difference, length = np.linalg.norm(a - b), np.linalg.norm(b)
    with np.errstate(invalid="ignore", divide="ignore"):  # rows of zeros are equal or not, and have no cosine
        cosines = np.where(norms == 0, (a == b).all(1), (a * b).sum(1) / norms)
        relative_error = difference / length if difference else 0.0
    return StageParity(
        stage,
        precision,
        cosine=round(float(cosines.min()), 7),
        relative_error=float(f"{relative_error:.2g}"),
        max_difference=float(f"{np.abs(a - b).max():.2g}"),
        max_reference=float(f"{np.abs(b).max():.3g}"),
    )


def _compare_decoder(
    decoder: Decoder, precision: Precision, samples: Sequence[SampleText], soft_tokens: Floats
) -> list[StageParity]:
    """Logits of prefill and decode steps, given the checkpoint's soft tokens of each reading."""
    pairs: dict[str, list[tuple[Floats, Floats]]] = {PREFILL_STAGE: [], STEP_STAGE: []}
    for step, texts, logits in _forced(decoder, samples, soft_tokens):
        expected = np.stack([text.logits[step] for text in texts])
        pairs[PREFILL_STAGE if step == 0 else STEP_STAGE].append((np.array(logits), expected))
    return [
        compare(stage, precision, np.concatenate([a for a, _ in found]), np.concatenate([b for _, b in found]))
        for stage, found in pairs.items()
        if found
    ]


def _agreement(decoder: Decoder, texts: Sequence[SampleText], soft_tokens: Floats) -> float:
    """Share of the checkpoint's tokens that are chosen, given soft tokens and the checkpoint's tokens before them."""
    agree = [
        _agrees(text, step, int(token))
        for step, group, logits in _forced(decoder, texts, soft_tokens)
        for text, token in zip(group, reduced(logits)[0], strict=True)
    ]
    return round(float(np.mean(agree)), 4)


def _forced(
    decoder: Decoder, texts: Sequence[SampleText], soft_tokens: Floats
) -> Iterator[tuple[int, list[SampleText], Logits]]:
    """Feed the decoder with the checkpoint's tokens, rows of unequal lengths together: step, its texts, and logits."""
    for first in range(0, len(texts), decoder.max_sequences):
        group = sorted(texts[first : first + decoder.max_sequences], key=lambda text: -len(text.token_ids))
        prompts = [sample_prompt(text, list(soft_tokens)) for text in group]
        prefilled = [prefilled_tokens(prompt, decoder.decoder_start_token_id) for prompt in prompts]
        yield 0, group, decoder.prefill(0, prompts)
        for step in range(1, len(group[0].token_ids)):
            going = [text for text in group if len(text.token_ids) > step]  # the longest first: rows stay 0..n-1
            tokens = np.array([text.token_ids[step - 1] for text in going], np.int64)
            lengths = np.array(prefilled[: len(going)], np.int64) + step - 1
            yield step, going, decoder.decode(tokens, lengths)


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


def _same_tokens(expected: SampleText, found: Sequence[int]) -> bool:
    """Token for token, or different from a tie on."""
    for step, token in enumerate(expected.token_ids):
        if step >= len(found):
            return False
        if found[step] != token:
            return _agrees(expected, step, found[step])
    return len(found) == len(expected.token_ids)


def _agrees(expected: SampleText, step: int, token: int) -> bool:
    logits = expected.logits[step]
    return bool(logits[expected.token_ids[step]] - logits[token] <= TIE * np.abs(logits).max())
