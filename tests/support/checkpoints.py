"""Random tiny BLIP-2 checkpoints in the Hugging Face layout, for tests that need a checkpoint and not its meaning.

    folder = save_blip2(tmp_path / "checkpoint", "llama", text={"num_hidden_layers": 3})
    model = Blip2ForConditionalGeneration.from_pretrained(folder)
    processor = Blip2Processor.from_pretrained(folder)

The weights are drawn wide enough that greedy text depends on the image and on the prompt, and ends at different
lengths. A checkpoint is a few hundred kilobytes, is written in well under a second, and is the same for the same
arguments. torch and transformers are imported by the functions, so that a test module may import this one freely.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from tests.support.languages import LANGUAGES

if TYPE_CHECKING:
    from transformers import Blip2ForConditionalGeneration, Blip2Processor, PreTrainedTokenizerFast

PROMPTS = (
    "",
    "a",
    "Question: what colour is the cat? Answer:",
    "this is a photo of",
    "the dog and\nthe child: ünïcode",
)
"""Prompts of unequal lengths; the empty one means plain captioning."""


@dataclass(frozen=True)
class TinySizes:
    """Sizes of everything but the language model; odd on purpose."""

    image_size: int = 28
    patch_size: int = 7
    vision_hidden: int = 36
    vision_layers: int = 2
    vision_heads: int = 3
    qformer_hidden: int = 40
    qformer_layers: int = 3
    qformer_heads: int = 5
    num_query_tokens: int = 6
    cross_attention_frequency: int = 2
    vision_intermediate: int | None = None
    qformer_intermediate: int | None = None


def make_processor(tokenizer: PreTrainedTokenizerFast, sizes: TinySizes) -> Blip2Processor:
    """A processor as published checkpoints carry it: bicubic resize to a square, CLIP's mean and deviation."""
    from transformers import Blip2Processor, BlipImageProcessor

    size = {"height": sizes.image_size, "width": sizes.image_size}
    return Blip2Processor(BlipImageProcessor(size=size), tokenizer, num_query_tokens=sizes.num_query_tokens)


def make_blip2(
    language: str = "opt",
    tokenizer_size: int = 320,
    image_token_id: int = 319,
    *,
    seed: int = 0,
    sizes: TinySizes | None = None,
    text: Mapping[str, Any] | None = None,
) -> Blip2ForConditionalGeneration:
    """A BLIP-2 with a language model of that kind, drawn from ``seed``; ``text`` overrides fields of its config."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    sizes = sizes or TinySizes()
    config = Blip2Config(
        vision_config=vision_config(sizes),
        qformer_config=qformer_config(sizes),
        text_config=LANGUAGES[language].config(tokenizer_size, text),
        num_query_tokens=sizes.num_query_tokens,
        image_token_index=image_token_id,
    )
    return draw_weights(Blip2ForConditionalGeneration(config), seed)


def make_blip2_opt(
    tokenizer_size: int = 320, image_token_id: int = 319, *, opt: Mapping[str, Any] | None = None, **options: Any
) -> Blip2ForConditionalGeneration:
    """:func:`make_blip2` with OPT; ``opt`` overrides fields of its ``OPTConfig``."""
    return make_blip2("opt", tokenizer_size, image_token_id, text=opt, **options)


def save_blip2(
    folder: Path,
    language: str = "opt",
    *,
    seed: int = 0,
    sizes: TinySizes | None = None,
    text: Mapping[str, Any] | None = None,
    max_shard_size: str = "5GB",
    **tokenizer: Any,
) -> Path:
    """Write a random BLIP-2 (weights, configurations, processor) into ``folder``, and return it.

    ``text`` overrides fields of the language model's configuration, ``tokenizer`` goes to its tokenizer's function;
    ``max_shard_size`` such as ``"100KB"`` shards the weights.
    """
    sizes = sizes or TinySizes()
    vocabulary = LANGUAGES[language].tokenizer(**tokenizer)
    image_token_id = vocabulary.convert_tokens_to_ids("<image>")
    model = make_blip2(language, len(vocabulary), image_token_id, seed=seed, sizes=sizes, text=text)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    make_processor(vocabulary, sizes).save_pretrained(folder)
    return folder


def save_blip2_opt(folder: Path, *, opt: Mapping[str, Any] | None = None, **options: Any) -> Path:
    """:func:`save_blip2` with OPT; ``opt`` overrides fields of its ``OPTConfig``."""
    return save_blip2(folder, "opt", text=opt, **options)


def make_images(count: int, *, seed: int = 0, size: tuple[int, int] = (64, 48)) -> list[Image.Image]:
    """``count`` different RGB images of coarse coloured patches, ``size`` = (width, height) pixels."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(patch, "RGB").resize(size, Image.Resampling.BICUBIC) for patch in patches]


def vision_config(sizes: TinySizes) -> dict[str, Any]:
    return {
        "hidden_size": sizes.vision_hidden,
        "intermediate_size": sizes.vision_intermediate or 2 * sizes.vision_hidden + 1,
        "num_hidden_layers": sizes.vision_layers,
        "num_attention_heads": sizes.vision_heads,
        "image_size": sizes.image_size,
        "patch_size": sizes.patch_size,
    }


def qformer_config(sizes: TinySizes) -> dict[str, Any]:
    return {
        "vocab_size": 32,
        "hidden_size": sizes.qformer_hidden,
        "intermediate_size": sizes.qformer_intermediate or 2 * sizes.qformer_hidden + 3,
        "num_hidden_layers": sizes.qformer_layers,
        "num_attention_heads": sizes.qformer_heads,
        "encoder_hidden_size": sizes.vision_hidden,
        "cross_attention_frequency": sizes.cross_attention_frequency,
        "max_position_embeddings": 16,
    }


def draw_weights(model: Any, seed: int) -> Any:
    """Draw every parameter of a model anew, and return it for inference."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            draw(name, parameter, generator)
    model.tie_weights()
    text_config = model.config.text_config
    LANGUAGES[text_config.model_type].finish(model.language_model, seed)
    return model.eval()


def draw(name: str, parameter: Any, generator: Any) -> None:
    """Matrices outweigh the residual stream, so that text varies; norms stay near 1, biases near 0."""
    import torch

    noise = torch.randn(parameter.shape, generator=generator)
    if "norm" in name.lower() and name.endswith("weight"):
        parameter.copy_(1 + 0.1 * noise)
    elif parameter.dim() < 2:
        parameter.copy_(0.1 * noise)
    elif parameter.dim() == 2 and "embed" not in name and "shared" not in name:
        gain = 4 if name.startswith("language_model") else 2
        if ".SelfAttention.q." in name or ".EncDecAttention.q." in name:  # T5 has no other scale of its scores
            gain = 0.5
        parameter.copy_(noise * gain * parameter.shape[1] ** -0.5)
    else:
        parameter.copy_(noise * (0.3 if "patch_embedding" not in name else 0.1))
