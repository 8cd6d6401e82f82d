"""Random tiny BLIP-2 checkpoints in the Hugging Face layout, for tests that need a checkpoint and not its meaning.

    folder = save_blip2_opt(tmp_path / "checkpoint", opt={"num_hidden_layers": 3})
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

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
"""Ids 0 to 3, as in OPT's own tokenizer; ``</s>`` begins and ends a text."""

OPT_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd heads": {"hidden_size": 60, "num_attention_heads": 5, "num_hidden_layers": 3, "ffn_dim": 77},
    "one head, one layer": {"hidden_size": 9, "num_attention_heads": 1, "num_hidden_layers": 1, "ffn_dim": 31},
    "post-norm, narrow embeddings": {"do_layer_norm_before": False, "word_embed_proj_dim": 20},
    "pre-norm, narrow embeddings": {"word_embed_proj_dim": 28, "hidden_size": 64, "num_attention_heads": 4},
    "post-norm": {"do_layer_norm_before": False, "num_hidden_layers": 3},
    "no bias": {"enable_bias": False},
    "plain norms": {"layer_norm_elementwise_affine": False},
    "no final norm": {"_remove_final_layer_norm": True},
    "untied, larger vocabulary": {"tie_word_embeddings": False, "vocab_size": 337},
    "gelu": {"activation_function": "gelu", "hidden_size": 40, "num_attention_heads": 2},
}
"""Overrides of ``OPTConfig``: every branch of the architecture, with odd sizes (heads of 12, 9, 20, ... values)."""

CORPUS = (
    "a photo of a red cat and a blue dog on a green chair",
    "Question: what colour is the large circle? Answer: yellow",
    "Question: how many children are there? Answer: two children and a dog",
    "this is a photo of the small house, the tree and the river",
)


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


def make_tokenizer(vocab_size: int = 320, *, image_token: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in the manner of OPT's: ``</s>`` before a text, ``<image>`` as the last id.

    It holds at most ``vocab_size`` tokens (260 are the bytes and the special tokens).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - int(image_token),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    if image_token:
        tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


def make_processor(tokenizer: PreTrainedTokenizerFast, sizes: TinySizes) -> Blip2Processor:
    """A processor as published checkpoints carry it: bicubic resize to a square, CLIP's mean and deviation."""
    from transformers import Blip2Processor, BlipImageProcessor

    size = {"height": sizes.image_size, "width": sizes.image_size}
    return Blip2Processor(BlipImageProcessor(size=size), tokenizer, num_query_tokens=sizes.num_query_tokens)


def make_blip2_opt(
    tokenizer_size: int = 320,
    image_token_id: int = 319,
    *,
    seed: int = 0,
    sizes: TinySizes | None = None,
    opt: Mapping[str, Any] | None = None,
) -> Blip2ForConditionalGeneration:
    """A BLIP-2 with an OPT language model, drawn from ``seed``; ``opt`` overrides fields of its ``OPTConfig``."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    sizes = sizes or TinySizes()
    config = Blip2Config(
        vision_config=vision_config(sizes),
        qformer_config=qformer_config(sizes),
        text_config=opt_config(tokenizer_size, opt),
        num_query_tokens=sizes.num_query_tokens,
        image_token_index=image_token_id,
    )
    return draw_weights(Blip2ForConditionalGeneration(config), seed)


def save_blip2_opt(
    folder: Path,
    *,
    seed: int = 0,
    sizes: TinySizes | None = None,
    opt: Mapping[str, Any] | None = None,
    tokenizer_size: int = 320,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a random BLIP-2 with OPT (weights, configurations, processor) into ``folder``, and return it.

    ``opt`` overrides fields of the language model's ``OPTConfig``; ``max_shard_size`` such as ``"100KB"`` shards it.
    """
    sizes = sizes or TinySizes()
    tokenizer = make_tokenizer(tokenizer_size)
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    model = make_blip2_opt(len(tokenizer), image_token_id, seed=seed, sizes=sizes, opt=opt)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    make_processor(tokenizer, sizes).save_pretrained(folder)
    return folder


def make_images(count: int, *, seed: int = 0, size: tuple[int, int] = (64, 48)) -> list[Image.Image]:
    """``count`` different RGB images of coarse coloured patches, ``size`` = (width, height) pixels."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(patch, "RGB").resize(size, Image.Resampling.BICUBIC) for patch in patches]


def opt_config(vocab_size: int, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A small OPT that ends a text as OPT's own tokenizer does."""
    from transformers import OPTConfig

    fields = {
        "vocab_size": vocab_size,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "ffn_dim": 80,
        "max_position_embeddings": 160,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    return OPTConfig(**(fields | dict(overrides or {}))).to_dict()


def vision_config(sizes: TinySizes) -> dict[str, Any]:
    return {
        "hidden_size": sizes.vision_hidden,
        "intermediate_size": 2 * sizes.vision_hidden + 1,
        "num_hidden_layers": sizes.vision_layers,
        "num_attention_heads": sizes.vision_heads,
        "image_size": sizes.image_size,
        "patch_size": sizes.patch_size,
    }


def qformer_config(sizes: TinySizes) -> dict[str, Any]:
    return {
        "vocab_size": 32,
        "hidden_size": sizes.qformer_hidden,
        "intermediate_size": 2 * sizes.qformer_hidden + 3,
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
            _draw(name, parameter, generator)
    model.tie_weights()
    return model.eval()


def _draw(name: str, parameter: Any, generator: Any) -> None:
    """Matrices outweigh the residual stream, so that text varies; norms stay near 1, biases near 0."""
    import torch

    noise = torch.randn(parameter.shape, generator=generator)
    if "norm" in name.lower() and name.endswith("weight"):
        parameter.copy_(1 + 0.1 * noise)
    elif parameter.dim() < 2:
        parameter.copy_(0.1 * noise)
    elif parameter.dim() == 2 and "embed" not in name:
        gain = 4 if name.startswith("language_model") else 2
        parameter.copy_(noise * gain * parameter.shape[1] ** -0.5)
    else:
        parameter.copy_(noise * (0.3 if "patch_embedding" not in name else 0.1))
