"""The checkpoints in the standard Hugging Face layout.

Weights are stored as fp16 while the configs say float32, so ``from_pretrained`` yields fp32 models whose values fp16
can hold. The frozen vision encoder is a shard of its own in ``checkpoint/``; the indices of the other checkpoints point
to that same file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    Blip2VisionConfig,
    GenerationConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from . import scenes
from .tokens import IMAGE_TOKEN

VISION_SHARD = "model-vision.safetensors"
SHARED_VISION = f"../checkpoint/{VISION_SHARD}"
_OWN_SHARD = "model-text.safetensors"


_QFORMER: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_attention_heads": 6,
    "encoder_hidden_size": 192,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
GenerationModel = Blip2ForConditionalGeneration | InstructBlipForConditionalGeneration


@dataclass(frozen=True)
class Shape:
    """How many layers a Q-Former has, and which of them look at the image: every ``frequency``-th."""

    layers: int = 4
    frequency: int = 1


def _qformer_config(shape: Shape, **more: Any) -> dict[str, Any]:
    return {
        **_QFORMER,
        "num_hidden_layers": shape.layers,
        "cross_attention_frequency": shape.frequency,
        **more,
    }


def generation_model(
    vision: Blip2VisionConfig, text: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, queries: int, shape: Shape
) -> Blip2ForConditionalGeneration:
    """The model with random weights; query tokens are drawn, as the library leaves them zero (and so alike)."""
    config = Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=_qformer_config(shape, vocab_size=30522),
        text_config=text.to_dict(),
        num_query_tokens=queries,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        dtype="float32",
    )
    model = Blip2ForConditionalGeneration(config)
    nn.init.normal_(model.query_tokens, std=0.5)
    return model


def instruct_model(
    vision: Blip2VisionConfig,
    text: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    queries: int,
    shape: Shape,
) -> InstructBlipForConditionalGeneration:
    """As :func:`generation_model`, with a Q-Former that reads the prompt too, in a WordPiece ``vocabulary``."""
    config = InstructBlipConfig(
        vision_config={**vision.to_dict(), "model_type": "instructblip_vision_model"},
        qformer_config=_qformer_config(shape, vocab_size=vocabulary),
        text_config=text.to_dict(),
        num_query_tokens=queries,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        dtype="float32",
    )
    model = InstructBlipForConditionalGeneration(config)
    nn.init.normal_(model.query_tokens, std=0.5)
    return model


def retrieval_model(vision: Blip2VisionConfig, vocabulary: int, queries: int) -> Blip2ForImageTextRetrieval:
    """As :func:`generation_model`; ``vocabulary`` is that of the WordPiece tokenizer."""
    config = Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=_qformer_config(Shape(), vocab_size=vocabulary, use_qformer_text_input=True),
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


def save_generation(
    model: GenerationModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    shared: str | None = None,
    wordpiece: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write config, processor (InstructBLIP's with the tokenizer ``wordpiece``), generation defaults and weights; those
    of the vision encoder go to a shard of their own, or are left to the one at ``shared``, relative to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    queries = model.config.num_query_tokens
    if wordpiece is None:
        processor = Blip2Processor(image_processor(), tokenizer, num_query_tokens=queries)
    else:
        processor = InstructBlipProcessor(image_processor(), tokenizer, wordpiece, num_query_tokens=queries)
    processor.save_pretrained(folder)
    text = model.config.text_config
    GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        decoder_start_token_id=getattr(text, "decoder_start_token_id", None),
        max_new_tokens=32,
    ).save_pretrained(folder)
    _save_weights(model, folder, shared)


def save_retrieval(
    model: Blip2ForImageTextRetrieval, tokenizer: PreTrainedTokenizerBase, folder: Path, shared: str
) -> None:
    """As :func:`save_generation`."""
    folder.mkdir(parents=True, exist_ok=True)
    Blip2Processor(image_processor(), tokenizer).save_pretrained(folder)
    _save_weights(model, folder, shared)


def _save_weights(model: nn.Module, folder: Path, shared: str | None) -> None:
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    state = _state(model)
    vision = {name: value for name, value in state.items() if name.startswith("vision_model.")}
    own = {name: value for name, value in state.items() if name not in vision}
    if shared is None:
        _save_shards(folder, {VISION_SHARD: vision, _OWN_SHARD: own}, external={})
    else:
        _save_shards(folder, {_OWN_SHARD: own}, external={shared: vision})


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """fp16 copies of the weights; of those that are tied, the first."""
    state, seen = {}, set()
    for name, value in model.state_dict().items():
        if value.data_ptr() not in seen:
            state[name] = value.detach().half().contiguous()
        seen.add(value.data_ptr())
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
