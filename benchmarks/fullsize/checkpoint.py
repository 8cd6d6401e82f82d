"""Checkpoints of the published models' true shapes and depth, with random weights, written tensor by tensor.

Shapes are those of the configurations of Salesforce/blip2-opt-2.7b, -opt-6.7b and -flan-t5-xl. The tokenizer is a small
one of bytes: ids beyond it decode to nothing, which costs no time and changes none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from tqdm import tqdm
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    GenerationConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

QUERIES = 32
IMAGE_SIZE = 224
_SHARD_BYTES = 2 << 30
_BLOCK = (1 << 24) + 43
"""Values that are drawn; tensors are cut from them at offsets of their own, and this length divides no width."""
_STD = 0.02
_HEADS = ("language_model.model.decoder.embed_tokens.weight", "language_model.lm_head.weight")
"""What logits are made by; OPT's is its table of embeddings."""
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


def _opt(width: int, ffn: int, layers: int) -> dict[str, Any]:
    return OPTConfig(
        vocab_size=50304,
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=ffn,
        num_hidden_layers=layers,
        num_attention_heads=32,
        max_position_embeddings=2048,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    ).to_dict()


def _t5(width: int, ffn: int, layers: int) -> dict[str, Any]:
    return T5Config(
        vocab_size=32128,
        d_model=width,
        d_kv=64,
        d_ff=ffn,
        num_layers=layers,
        num_heads=32,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    ).to_dict()


@dataclass(frozen=True)
class Kind:
    """The language model: its configuration's function, and width, feed-forward width and layers of it."""

    config: Any
    width: int
    ffn: int
    layers: int


KINDS = {
    "opt-2.7b": Kind(_opt, 2560, 10240, 32),
    "opt-6.7b": Kind(_opt, 4096, 16384, 32),
    "flan-t5-xl": Kind(_t5, 2048, 5120, 24),
}


def write_checkpoint(name: str, folder: Path, layers: int | None = None, shrink: int = 1) -> None:
    """Write the checkpoint ``name`` of :data:`KINDS` into ``folder``, in fp16.

    Args:
        name: of the kind.
        folder: where it goes.
        layers: cut every stack to so many layers, for trials.
        shrink: divide every width by it, for trials.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    config = _config(KINDS[name], layers, shrink, tokenizer.convert_tokens_to_ids("<image>"))
    config.architectures = ["Blip2ForConditionalGeneration"]
    config.save_pretrained(folder)
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    Blip2Processor(BlipImageProcessorPil(size=side), tokenizer, num_query_tokens=QUERIES).save_pretrained(folder)
    GenerationConfig(bos_token_id=2, eos_token_id=2, pad_token_id=1).save_pretrained(folder)
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(config)
    _write_weights(model, folder)


def full_config(name: str) -> Blip2Config:
    """The configuration of a kind of :data:`KINDS` at its full size."""
    return _config(KINDS[name], None, 1, image_token_id=len(_SPECIAL))


def _config(kind: Kind, layers: int | None, shrink: int, image_token_id: int) -> Blip2Config:
    vision = {
        "hidden_size": 1408 // shrink,
        "intermediate_size": 6144 // shrink,
        "num_hidden_layers": layers or 39,
        "num_attention_heads": 16,
        "image_size": IMAGE_SIZE,
        "patch_size": 14,
    }
    qformer = {
        "hidden_size": 768 // shrink,
        "intermediate_size": 3072 // shrink,
        "num_hidden_layers": layers or 12,
        "num_attention_heads": 12,
        "encoder_hidden_size": 1408 // shrink,
        "cross_attention_frequency": 2,
    }
    return Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=kind.config(kind.width // shrink, kind.ffn // shrink, layers or kind.layers),
        num_query_tokens=QUERIES,
        image_token_index=image_token_id,
        dtype="float16",
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*_SPECIAL, *alphabet))}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


def _write_weights(model: torch.nn.Module, folder: Path) -> None:
    """Shards of at most 2 GiB, and their index."""
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal size
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()
        size = 0

    for name, tensor in _drawn(model):
        if shard and size + tensor.nbytes > _SHARD_BYTES:
            flush()
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _drawn(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter once, in fp16: matrices as transformers draws them, norms 1, biases 0."""
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(_BLOCK, generator=generator) * _STD).half()
    for name, parameter in tqdm(list(model.named_parameters()), "weights"):  # a tied one comes once
        if parameter.dim() > 1:
            start = int(torch.randint(_BLOCK, (), generator=generator))
            copies = -(-(start + parameter.numel()) // _BLOCK)
            drawn = block.repeat(copies)[start : start + parameter.numel()].reshape(parameter.shape)
            drawn = drawn * (_std(name, model.config) / _STD)
            yield name, drawn * _peaks(len(drawn)) if name in _HEADS else drawn
        else:
            fill = torch.ones if "norm" in name.lower() and name.endswith("weight") else torch.zeros
            yield name, fill(parameter.shape, dtype=torch.float16)


def _peaks(rows: int) -> Tensor:
    """By how much each token stands out (V, 1): a few by 3 to 10 times, nearly all not at all.

    Without it, the two largest of fifty thousand random logits lie closer together than any rounding, as they do in no
    trained model, and no quantised bundle would say what the checkpoint says.
    """
    ranks = torch.randperm(rows, generator=torch.Generator().manual_seed(1)) + 1
    return (10 / ranks.sqrt()).clamp(min=1)[:, None].half()


def _std(name: str, config: Blip2Config) -> float:
    """Standard deviation of a matrix, as transformers draws it (``_init_weights``).

    T5 does not scale its scores; its queries are drawn small in return, or attention would be saturated.
    """
    text = config.text_config
    part = name.split(".")[-2] if "." in name else name
    if text.model_type != "t5" or not name.startswith("language_model."):
        return _STD
    if part in ("shared", "lm_head"):
        return 1.0
    widths = {"q": text.d_model * text.d_kv, "o": text.num_heads * text.d_kv, "wo": text.d_ff}
    return float(widths.get(part, text.d_model) ** -0.5)
