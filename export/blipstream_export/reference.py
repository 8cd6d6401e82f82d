"""What the checkpoint itself computes on sample inputs, in fp32 by transformers: the truth of the parity report."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from blipstream.decoding.request import Prompt
from blipstream.errors import CheckpointError
from blipstream.instructions import instruction_inputs
from blipstream.manifest import DecoderSection
from blipstream_export.checkpoint import Checkpoint
from blipstream_export.generation import NEUTRAL, begin_token_id, empty_prompt_ids
from blipstream_export.tokenizer import SAMPLE_PROMPTS, instruction_ids

if TYPE_CHECKING:
    import torch

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Extent:
    """How much the checkpoint is run."""

    texts: int
    """Sample texts, unless the KV cache has no room for some of them."""
    new_tokens: int
    """Tokens generated for each, unless a row of the KV cache has room for fewer."""


FULL = Extent(texts=12, new_tokens=20)
BRIEF = Extent(texts=4, new_tokens=6)
"""For large models, of which each token costs seconds."""

_PROMPTS = ("", *SAMPLE_PROMPTS)
"""Of unequal lengths; the first means plain captioning."""

_IMAGE_SIZES = ((640, 480), (213, 320), (96, 96), (1000, 37))
"""Width and height in pixels: landscape, portrait, small, a strip."""


@dataclass(frozen=True)
class Reading:
    """One image as the Q-Former reads it."""

    image: int
    """Index of the image."""
    instruction: tuple[int, ...] | None
    """Ids for the Q-Former; None where it reads no instructions."""
    soft_tokens: Floats
    """(Q, D)"""


@dataclass(frozen=True)
class SampleText:
    """Greedy generation from one image, or several frames, and one prompt."""

    images: tuple[int, ...]
    """Index of each image."""
    readings: tuple[int, ...]
    """Index of each image's reading, with whose soft tokens it begins."""
    prompt: str
    prompt_ids: tuple[int, ...]
    """Token ids behind the soft tokens."""
    token_ids: tuple[int, ...]
    """Generated tokens, the end token included."""
    logits: Floats
    """(n, V), the logits from which each of them was chosen."""


@dataclass(frozen=True)
class Reference:
    """Outputs of every stage."""

    images: list[Image.Image]
    pixel_values: Floats
    """(N, 3, S, S)."""
    image_embeds: Floats
    """(N, T, C)."""
    readings: list[Reading]
    """One for each image; where the Q-Former reads instructions, one for each image and prompt."""
    texts: list[SampleText]
    streamed: bool = False
    """Whether the model's weights were deferred."""

    def prompt(self, text: SampleText) -> Prompt:
        """What a text begins with, given the checkpoint's own soft tokens."""
        return sample_prompt(text, [reading.soft_tokens for reading in self.readings])


def sample_prompt(text: SampleText, soft_tokens: Sequence[Floats]) -> Prompt:
    """What a text begins with, given the soft tokens (Q, D) of every reading."""
    return Prompt(np.concatenate([soft_tokens[reading] for reading in text.readings]), text.prompt_ids)


def sample_images(sizes: Sequence[tuple[int, int]] = _IMAGE_SIZES, *, seed: int = 0) -> list[Image.Image]:
    """Synthetic RGB images of coarse colour patches with fine noise, ``sizes`` = (width, height) each."""
    rng = np.random.default_rng(seed)
    images = []
    for width, height in sizes:
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        noisy = smooth + rng.integers(-24, 25, smooth.shape, dtype=np.int16)
        images.append(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))
    return images


@dataclass(frozen=True)
class _Sample:
    images: tuple[int, ...]
    prompt: str
    prompt_ids: tuple[int, ...]
    instruction: tuple[int, ...] | None
    room: int
    """New tokens for which a row of the KV cache has room."""

    @property
    def keys(self) -> list[tuple[int, tuple[int, ...] | None]]:
        """Each image with the instruction: what the Q-Former reads."""
        return [(image, self.instruction) for image in self.images]


def compute_reference(
    model: Any,
    checkpoint: Checkpoint,
    sizes: DecoderSection,
    extent: Extent = FULL,
    *,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Reference:
    """Run the checkpoint on the sample images and prompts; prompts that do not fit ``sizes`` are left out.

    Args:
        model: the model of transformers, in fp32; its weights may be deferred.
        checkpoint: the checkpoint.
        sizes: of the KV cache that will serve it.
        extent: how much to run.
        on_progress: is called with how many of the samples are done, and how many there are.

    Raises:
        CheckpointError: an output is infinite or NaN.
    """
    images = sample_images()
    samples = _samples(checkpoint, len(images), sizes)[: extent.texts]
    reference = _compute(model, checkpoint, images, samples, extent.new_tokens, on_progress)
    _check_finite(reference, model, checkpoint)
    return reference


def _check_finite(reference: Reference, model: Any, checkpoint: Checkpoint) -> None:
    import torch

    from blipstream_export.deferred import computing

    outputs = (
        reference.image_embeds,
        *(r.soft_tokens for r in reference.readings),
        *(t.logits for t in reference.texts),
    )
    if all(np.isfinite(output).all() for output in outputs):
        return
    with torch.no_grad(), computing():
        broken = [name for name, weight in model.named_parameters() if not bool(torch.isfinite(weight).all())]
    cause = f"its tensor {broken[0]} holds such values" if broken else "its weights are finite"
    raise CheckpointError(f"the checkpoint {checkpoint.name} computes infinite values or NaN in fp32: {cause}")


def _compute(
    model: Any,
    checkpoint: Checkpoint,
    images: list[Image.Image],
    samples: Sequence[_Sample],
    new_tokens: int,
    on_progress: Callable[[int, int], None],
) -> Reference:
    import torch

    from blipstream_export.deferred import Deferred, computing

    keys = list(dict.fromkeys(key for sample in samples for key in sample.keys))
    pixel_values = checkpoint.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad(), computing(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks of transformers on defaults that are set here on purpose
        batches = pixel_values.split(_IMAGES_AT_ONCE)
        image_embeds = torch.cat([model.vision_model(batch).last_hidden_state for batch in batches])
        readings = [_read(model, checkpoint, pixel_values, key) for key in keys]
        texts: list[SampleText] = []
        for sample in samples:
            on_progress(len(texts), len(samples))
            order = tuple(keys.index(key) for key in sample.keys)
            texts.append(_generate(model, checkpoint, pixel_values, sample, order, new_tokens))
    streamed = any(isinstance(parameter, Deferred) for parameter in model.parameters())
    return Reference(images, pixel_values.numpy(), image_embeds.numpy(), readings, texts, streamed)


_IMAGES_AT_ONCE = 8

CALIBRATION_PROMPTS = ("", *SAMPLE_PROMPTS[:2])
_CALIBRATION_TOKENS = 4


def exercise(
    model: Any,
    checkpoint: Checkpoint,
    images: Sequence[Image.Image],
    *,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> None:
    """Run the checkpoint on a user's images, for what can be observed of its layers meanwhile.

    Each image is captioned or asked about, by :data:`CALIBRATION_PROMPTS` in turn, for a few tokens.
    """
    import torch

    from blipstream_export.deferred import computing

    frames = (0,) * checkpoint.family.image_side.num_frames
    with torch.no_grad(), computing(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index, image in enumerate(images):
            on_progress(index, len(images))
            prompt = CALIBRATION_PROMPTS[index % len(CALIBRATION_PROMPTS)]
            ids, instruction = _prompt_ids(checkpoint, prompt), instruction_ids(checkpoint, prompt)
            sample = _Sample(frames, prompt, ids, instruction, _CALIBRATION_TOKENS)
            pixel_values = checkpoint.processor.image_processor([image], return_tensors="pt")["pixel_values"]
            _generate(model, checkpoint, pixel_values, sample, (), _CALIBRATION_TOKENS)


def compute_calibration(
    model: Any,
    checkpoint: Checkpoint,
    images: list[Image.Image],
    sizes: DecoderSection,
    *,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Reference:
    """What :func:`exercise` runs, with the outputs of every stage; prompts that find no room are passed over."""
    frames = checkpoint.family.image_side.num_frames
    count = len(CALIBRATION_PROMPTS)
    samples = []
    for index in range(len(images)):
        turn = (CALIBRATION_PROMPTS[(index + offset) % count] for offset in range(count))
        fitting = (_sample(checkpoint, sizes, (index,) * frames, prompt) for prompt in turn)
        samples += [sample for sample in fitting if sample is not None][:1]
    return _compute(model, checkpoint, images, samples, _CALIBRATION_TOKENS, on_progress)


def _samples(checkpoint: Checkpoint, num_images: int, sizes: DecoderSection) -> list[_Sample]:
    frames = range(checkpoint.family.image_side.num_frames)
    samples = []
    for index, prompt in enumerate([*_PROMPTS, *reversed(_PROMPTS)]):
        images = tuple((index + frame) % num_images for frame in frames)
        samples.append(_sample(checkpoint, sizes, images, prompt))
    return [sample for sample in samples if sample is not None]


def _sample(checkpoint: Checkpoint, sizes: DecoderSection, images: tuple[int, ...], prompt: str) -> _Sample | None:
    """The sample, unless the model cannot read its prompt."""
    prompt_ids, instruction = _prompt_ids(checkpoint, prompt), instruction_ids(checkpoint, prompt)
    room = sizes.room_behind(checkpoint.num_soft_tokens + len(prompt_ids))
    readable = instruction is None or len(instruction) <= checkpoint.config.qformer_config.max_position_embeddings
    return _Sample(images, prompt, prompt_ids, instruction, room) if prompt_ids and room > 0 and readable else None


def _prompt_ids(checkpoint: Checkpoint, prompt: str) -> tuple[int, ...]:
    if not prompt:  # what generate puts behind the soft tokens when it is given no prompt
        return empty_prompt_ids(checkpoint)
    return tuple(int(token) for token in checkpoint.processor.tokenizer(prompt)["input_ids"])


def _read(
    model: Any, checkpoint: Checkpoint, pixel_values: torch.Tensor, key: tuple[int, tuple[int, ...] | None]
) -> Reading:
    """The token embeddings that transformers makes of one image's projection."""
    import torch

    image, instruction = key
    pixels = _pixels(checkpoint, pixel_values, [image])
    features = getattr(model, checkpoint.family.image_side.features)(
        pixels, **_instruction(instruction), return_dict=True
    )
    projected = features.pooler_output  # (1, Q, C)
    embeds = torch.zeros(*projected.shape[:2], int(model.get_input_embeddings().embedding_dim))
    soft_tokens = embeds.masked_scatter(torch.ones(*projected.shape[:2], 1, dtype=torch.bool), projected)
    return Reading(image, instruction, soft_tokens[0].numpy())


def _pixels(checkpoint: Checkpoint, pixel_values: torch.Tensor, images: Sequence[int]) -> torch.Tensor:
    """What ``generate`` wants of some images: (1, 3, S, S), or (1, F, 3, S, S) where it reads frames."""
    chosen = pixel_values[list(images)]
    return chosen if checkpoint.family.image_side.num_frames == 1 else chosen[None]


def _instruction(ids: tuple[int, ...] | None) -> dict[str, torch.Tensor]:
    """What ``generate`` wants for the Q-Former, (1, S) each; nothing where it reads no instructions."""
    import torch

    return {} if ids is None else {name: torch.from_numpy(x) for name, x in instruction_inputs(ids).items()}


def _generate(
    model: Any,
    checkpoint: Checkpoint,
    pixel_values: torch.Tensor,
    sample: _Sample,
    readings: tuple[int, ...],
    new_tokens: int,
) -> SampleText:
    import torch

    placeholder = checkpoint.placeholder_id
    if placeholder is None:  # an old checkpoint: any id marks the soft tokens that the prompt does not use
        vocabulary = range(checkpoint.config.text_config.vocab_size)
        placeholder = next(token for token in vocabulary if token not in sample.prompt_ids)
    setattr(model.config, checkpoint.family.image_side.placeholder_field, placeholder)
    inputs = {"pixel_values": _pixels(checkpoint, pixel_values, sample.images), **_instruction(sample.instruction)}
    if sample.prompt or begin_token_id(checkpoint) is None:
        soft = [placeholder] * checkpoint.num_soft_tokens
        inputs["input_ids"] = torch.tensor([[*soft, *sample.prompt_ids]])
    output = model.generate(
        **inputs,
        max_new_tokens=min(new_tokens, sample.room),
        repetition_penalty=1.0,
        **NEUTRAL,
        use_cache=_caches(checkpoint),
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.cat(output.logits).numpy()  # (n, V)
    token_ids = tuple(output.sequences[0, -len(logits) :].tolist())
    return SampleText(sample.images, readings, sample.prompt, sample.prompt_ids, token_ids, logits)


def _caches(checkpoint: Checkpoint) -> bool:
    """Whether ``generate`` can keep a cache: transformers 5 makes T5's as deep as the encoder."""
    text = checkpoint.config.text_config
    return bool(getattr(text, "num_decoder_layers", 0) <= text.num_hidden_layers)
