"""What the checkpoint itself computes on sample inputs, in fp32 by transformers: the truth of the parity report."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from blipstream.contract import DecoderSection
from blipstream_export.checkpoint import Checkpoint
from blipstream_export.generation import empty_prompt_ids
from blipstream_export.tokenizer import SAMPLE_PROMPTS

if TYPE_CHECKING:
    import torch

Floats = npt.NDArray[np.float32]

NEW_TOKENS = 20
"""Tokens generated for each sample, unless a row of the KV cache has room for fewer."""

_PROMPTS = ("", *SAMPLE_PROMPTS)
"""Of unequal lengths; the first means plain captioning."""

_IMAGE_SIZES = ((640, 480), (213, 320), (96, 96), (1000, 37))
"""Width and height in pixels: landscape, portrait, small, a strip."""


@dataclass(frozen=True)
class SampleText:
    """Greedy generation from one image and one prompt."""

    image: int
    """Index of the image."""
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
    soft_tokens: Floats
    """(N, Q, D)."""
    texts: list[SampleText]


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


def compute_reference(model: Any, checkpoint: Checkpoint, sizes: DecoderSection) -> Reference:
    """Run the checkpoint on the sample images and prompts; prompts that do not fit ``sizes`` are left out."""
    import torch

    images = sample_images()
    pixel_values = checkpoint.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks of transformers on defaults that are set here on purpose
        features = model.get_image_features(pixel_values, return_dict=True)
        texts = [
            _generate(model, checkpoint, pixel_values, index % len(images), prompt, sizes)
            for index, prompt in enumerate([*_PROMPTS, *reversed(_PROMPTS)])
        ]
        soft_tokens = torch.cat([_scatter(model, image) for image in features.pooler_output])
    return Reference(
        images=images,
        pixel_values=pixel_values.numpy(),
        image_embeds=features.last_hidden_state.numpy(),
        soft_tokens=soft_tokens.numpy(),
        texts=[text for text in texts if text is not None],
    )


def _scatter(model: Any, projected: torch.Tensor) -> torch.Tensor:
    """The token embeddings that transformers makes of one image's projection (Q, C) -> (1, Q, D)."""
    import torch

    width = int(model.get_input_embeddings().embedding_dim)
    embeds = torch.zeros(1, projected.shape[0], width)
    return embeds.masked_scatter(torch.ones(1, projected.shape[0], 1, dtype=torch.bool), projected)


def _generate(
    model: Any,
    checkpoint: Checkpoint,
    pixel_values: torch.Tensor,
    image: int,
    prompt: str,
    sizes: DecoderSection,
) -> SampleText | None:
    import torch

    num_queries = checkpoint.config.num_query_tokens
    prompt_ids = _prompt_ids(checkpoint, prompt)
    room = sizes.room_behind(num_queries + len(prompt_ids))
    if room < 1:
        return None
    placeholder = checkpoint.config.image_token_index
    if placeholder is None:  # an old checkpoint: any id marks the soft tokens that the prompt does not use
        placeholder = next(
            token for token in range(checkpoint.config.text_config.vocab_size) if token not in prompt_ids
        )
    model.config.image_token_index = placeholder
    inputs: dict[str, Any] = {"pixel_values": pixel_values[image : image + 1]}
    if prompt:
        inputs["input_ids"] = torch.tensor([[placeholder] * num_queries + list(prompt_ids)])
    output = model.generate(
        **inputs,
        max_new_tokens=min(NEW_TOKENS, room),
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.cat(output.logits).numpy()  # (n, V)
    token_ids = output.sequences[0, -len(logits) :].tolist()
    return SampleText(image, prompt, prompt_ids, tuple(token_ids), logits)


def _prompt_ids(checkpoint: Checkpoint, prompt: str) -> tuple[int, ...]:
    if not prompt:  # what generate puts behind the soft tokens when it is given no prompt
        return empty_prompt_ids(checkpoint)
    return tuple(int(token) for token in checkpoint.processor.tokenizer(prompt)["input_ids"])
