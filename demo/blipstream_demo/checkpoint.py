"""The two checkpoints in the standard Hugging Face layout.

Weights are stored as fp16 while the configs say float32, so ``from_pretrained`` yields fp32 models whose values fp16
can hold. The frozen vision encoder is a shard of its own in ``checkpoint/``; the index of ``checkpoint-retrieval/``
points to that same file.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    GenerationConfig,
    OPTConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from . import scenes
from .text import IMAGE_TOKEN

VISION_SHARD = "model-vision.safetensors"
_OWN_SHARD = "model-text.safetensors"


def qformer_config(vocabulary: int, with_text: bool) -> Blip2QFormerConfig:
    return Blip2QFormerConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        cross_attention_frequency=1,
        encoder_hidden_size=192,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        use_qformer_text_input=with_text,
    )


def generation_model(
    vision: Blip2VisionConfig, text: OPTConfig, tokenizer: PreTrainedTokenizerBase, queries: int
) -> Blip2ForConditionalGeneration:
    """The model with random weights; query tokens are drawn, as the library leaves them zero (and so alike)."""
    config = Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=qformer_config(30522, with_text=False).to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=queries,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        dtype="float32",
    )
    model = Blip2ForConditionalGeneration(config)
    nn.init.normal_(model.query_tokens, std=0.5)
    return model


def retrieval_model(vision: Blip2VisionConfig, vocabulary: int, queries: int) -> Blip2ForImageTextRetrieval:
    """As :func:`generation_model`; ``vocabulary`` is that of the WordPiece tokenizer."""
    config = Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=qformer_config(vocabulary, with_text=True).to_dict(),
        num_query_tokens=queries,
        image_text_hidden_size=64,
        image_token_index=None,
        dtype="float32",
    )
    config.text_config.dtype = "float32"
    model = Blip2ForImageTextRetrieval(config)
    nn.init.normal_(model.query_tokens, std=0.5)
    return model


def image_processor() -> BlipImageProcessorPil:
    side = {"height": scenes.IMAGE_SIZE, "width": scenes.IMAGE_SIZE}
    return BlipImageProcessorPil(size=side)


def save_generation(model: Blip2ForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write config, processor, generation defaults, and the weights in two shards."""
    folder.mkdir(parents=True, exist_ok=True)
    queries = model.config.num_query_tokens
    Blip2Processor(image_processor(), tokenizer, num_query_tokens=queries).save_pretrained(folder)
    _save_config(model, folder)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=32,
    ).save_pretrained(folder)
    state = _state(model)
    vision = {name: value for name, value in state.items() if name.startswith("vision_model.")}
    own = {name: value for name, value in state.items() if name not in vision}
    _save_shards(folder, {VISION_SHARD: vision, _OWN_SHARD: own}, external={})


def save_retrieval(
    model: Blip2ForImageTextRetrieval, tokenizer: PreTrainedTokenizerBase, folder: Path, shared: str
) -> None:
    """Write config, processor and weights; those of the vision encoder are left to the shard at ``shared``, a path
    relative to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    Blip2Processor(image_processor(), tokenizer).save_pretrained(folder)
    _save_config(model, folder)
    state = _state(model)
    vision = {name: value for name, value in state.items() if name.startswith("vision_model.")}
    own = {name: value for name, value in state.items() if name not in vision}
    _save_shards(folder, {_OWN_SHARD: own}, external={shared: vision})


def _save_config(model: nn.Module, folder: Path) -> None:
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """fp16 copies of the weights; the output layer is left out where it is tied to the embeddings."""
    state = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    state.pop("language_model.lm_head.weight", None)
    return state


def _save_shards(
    folder: Path, shards: dict[str, dict[str, torch.Tensor]], external: dict[str, dict[str, torch.Tensor]]
) -> None:
    weight_map: dict[str, str] = {}
    size = 0
    for name, tensors in {**shards, **external}.items():
        weight_map.update(dict.fromkeys(tensors, name))
        size += sum(value.numel() * value.element_size() for value in tensors.values())
        if name in shards:
            save_file(tensors, folder / name, metadata={"format": "pt"})
            (folder / name).chmod(0o644)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
