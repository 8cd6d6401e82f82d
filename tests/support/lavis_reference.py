"""What LAVIS computes, in plain torch: its two ViTs written down anew, and the way from an image to greedy text.

The ViTs follow the papers (EVA, arXiv 2211.07636; CLIP, arXiv 2103.00020) and the sizes and epsilons of LAVIS's
``eva_vit.py`` and ``clip_vit.py``. For the Q-Former and the language model the classes of transformers are the truth.
Nothing here uses the exporter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from tests.support.lavis_parts import SavedParts

Tensors = Mapping[str, Tensor]

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


def eva_vit(tensors: Tensors, pixel_values: Tensor, blocks: int) -> Tensor:
    """Output of the first ``blocks`` blocks of an EVA ViT: (B, 3, S, S) -> (B, 1 + P, C)."""
    weight = tensors["patch_embed.proj.weight"]
    width, patch = weight.shape[0], weight.shape[2]
    x = functional.conv2d(pixel_values, weight, tensors["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    side = pixel_values.shape[-1] // patch
    positions = _resized(tensors["pos_embed"][0], side, align_corners=False)
    x = torch.cat([tensors["cls_token"].expand(len(x), -1, -1), x], dim=1) + positions

    def norm(name: str, y: Tensor) -> Tensor:
        return functional.layer_norm(y, (width,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps=1e-6)

    def linear(name: str, y: Tensor) -> Tensor:
        return functional.linear(y, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    for index in range(blocks):
        block = f"blocks.{index}"
        bias = torch.cat([tensors[f"{block}.attn.q_bias"], torch.zeros(width), tensors[f"{block}.attn.v_bias"]])
        qkv = functional.linear(norm(f"{block}.norm1", x), tensors[f"{block}.attn.qkv.weight"], bias)
        query, key, value = (part.unflatten(2, (-1, 88)).transpose(1, 2) for part in qkv.split(width, dim=2))
        attended = torch.softmax(query @ key.transpose(2, 3) * 88**-0.5, dim=-1) @ value
        x = x + linear(f"{block}.attn.proj", attended.transpose(1, 2).flatten(2))
        inner = functional.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x)))
        x = x + linear(f"{block}.mlp.fc2", inner)
    return x


def clip_vit(tensors: Tensors, pixel_values: Tensor, blocks: int) -> Tensor:
    """Output of the first ``blocks`` blocks of a CLIP ViT: (B, 3, S, S) -> (B, 1 + P, C)."""
    weight = tensors["conv1.weight"]
    width, patch = weight.shape[0], weight.shape[2]
    x = functional.conv2d(pixel_values, weight, stride=patch).flatten(2).transpose(1, 2)
    side = pixel_values.shape[-1] // patch
    x = torch.cat([tensors["class_embedding"].expand(len(x), 1, width), x], dim=1)
    x = x + _resized(tensors["positional_embedding"], side, align_corners=True)
    x = functional.layer_norm(x, (width,), tensors["ln_pre.weight"], tensors["ln_pre.bias"])
    for index in range(blocks):
        prefix = f"transformer.resblocks.{index}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        attention = nn.MultiheadAttention(width, width // 64, batch_first=True).eval()
        attention.load_state_dict({n.removeprefix("attn."): t for n, t in own.items() if n.startswith("attn.")})
        y = functional.layer_norm(x, (width,), own["ln_1.weight"], own["ln_1.bias"])
        x = x + attention(y, y, y, need_weights=False)[0]
        y = functional.layer_norm(x, (width,), own["ln_2.weight"], own["ln_2.bias"])
        y = functional.linear(y, own["mlp.c_fc.weight"], own["mlp.c_fc.bias"])
        y = y * torch.sigmoid(1.702 * y)
        x = x + functional.linear(y, own["mlp.c_proj.weight"], own["mlp.c_proj.bias"])
    return x


def _resized(positions: Tensor, side: int, *, align_corners: bool) -> Tensor:
    """Position embeddings (1 + P, C) for ``side`` x ``side`` patches."""
    old = round((len(positions) - 1) ** 0.5)
    if old == side:
        return positions
    grid = positions[1:].T.reshape(1, -1, old, old)
    grid = functional.interpolate(grid, (side, side), mode="bicubic", align_corners=align_corners)
    return torch.cat([positions[:1], grid.flatten(2)[0].T])


class LavisReference:
    """The composed model: ViT and ``ln_vision``, Q-Former, projection, language model, one request at a time."""

    def __init__(self, parts: SavedParts, blocks: int, image_size: int) -> None:
        self.tensors: dict[str, Tensor] = torch.load(parts.trained, weights_only=True)["model"]
        self._vision: dict[str, Tensor] = torch.load(parts.vision, weights_only=True)
        self._vit = eva_vit if "pos_embed" in self._vision else clip_vit
        self._blocks, self._image_size = blocks, image_size
        self._qformer = _load_qformer(self.tensors, instructed=parts.qformer_tokenizer is not None)
        self._qformer_tokenizer = _load_tokenizer(parts.qformer_tokenizer)
        self._language = _load_language_model(parts.llm)

    @torch.no_grad()
    def image_embeds(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 1 + P, C)."""
        features = self._vit(self._vision, pixel_values, self._blocks)
        norm = self.tensors["ln_vision.weight"], self.tensors["ln_vision.bias"]
        return functional.layer_norm(features, features.shape[-1:], *norm, eps=1e-5)

    @torch.no_grad()
    def soft_tokens(self, pixel_values: Tensor, prompt: str = "") -> Tensor:
        """(B, 3, S, S) -> (B, Q, D); the prompt counts where the Q-Former reads instructions."""
        embeds = self.image_embeds(pixel_values)
        queries = self.tensors["query_tokens"].expand(len(embeds), -1, -1)
        text = {}
        if self._qformer_tokenizer is not None:
            ids = self._qformer_tokenizer(prompt, return_tensors="pt")["input_ids"].expand(len(embeds), -1)
            seen = torch.ones(len(embeds), queries.shape[1] + ids.shape[1], dtype=torch.int64)
            text = {"input_ids": ids, "attention_mask": seen}
        read = self._qformer(query_embeds=queries, encoder_hidden_states=embeds, **text).last_hidden_state
        (name,) = {name for name in ("opt_proj", "t5_proj", "llm_proj") if f"{name}.weight" in self.tensors}
        read = read[:, : queries.shape[1]]
        return functional.linear(read, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def pixel_values(self, image: Image.Image) -> Tensor:
        """(1, 3, S, S), as LAVIS's ``blip_image_eval`` makes them."""
        resized = image.convert("RGB").resize((self._image_size, self._image_size), Image.Resampling.BICUBIC)
        scaled = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).float() / 255
        return ((scaled - MEAN[:, None, None]) / STD[:, None, None])[None]

    @torch.no_grad()
    def generate(self, ask: Any, *, max_new_tokens: int) -> tuple[list[int], str]:
        """Greedy tokens and their text for ``ask.image`` and ``ask.prompt``, as LAVIS's ``generate`` makes them."""
        language = self._language
        ids = torch.tensor([language.encode(ask.prompt)])
        soft_tokens = self.soft_tokens(self.pixel_values(ask.image), ask.prompt)
        embeds = torch.cat([soft_tokens, language.model.get_input_embeddings()(ids)], dim=1)
        output = language.model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.int64),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=language.end,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens: list[int] = output.sequences[0, -len(output.logits) :].tolist()
        return tokens, language.tokenizer.decode(tokens, skip_special_tokens=True)


@dataclass(frozen=True)
class _LanguageModel:
    """A language model as LAVIS sets it up in ``blip2_opt.py``, ``blip2_t5.py`` and ``blip2_vicuna_instruct.py``."""

    model: Any
    tokenizer: Any
    end: int
    """The token at which a text ends."""

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt. LAVIS's tokenizer of LLaMA begins a text with ``</s>``, whose id is 2."""
        if self.model.config.model_type == "llama":
            return [2, *self.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        return list(self.tokenizer(prompt)["input_ids"])


def _load_language_model(folder: Path) -> _LanguageModel:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config, tokenizer = AutoConfig.from_pretrained(folder), _load_tokenizer(folder)
    if config.model_type == "t5":
        config.dense_act_fn = "gelu"
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, config=config, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    end = config.eos_token_id
    if config.model_type == "opt":
        end = tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    return _LanguageModel(model.eval(), tokenizer, end)


def _load_tokenizer(folder: Path | None) -> Any:
    from transformers import AutoTokenizer

    return None if folder is None else AutoTokenizer.from_pretrained(folder)


def _load_qformer(tensors: Tensors, *, instructed: bool) -> Any:
    import transformers

    own = {
        name.removeprefix("Qformer.bert.").replace(".self.", ".attention."): tensor
        for name, tensor in tensors.items()
        if name.startswith("Qformer.bert.")
    }
    norm = "embeddings.layernorm" if instructed else "layernorm"
    own = {name.replace("embeddings.LayerNorm", norm): tensor for name, tensor in own.items()}
    keys = [name for name in own if name.endswith("crossattention.attention.key.weight")]
    layers = 1 + max(int(name.split(".")[2]) for name in own if name.startswith("encoder.layer."))
    width = tensors["query_tokens"].shape[2]
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "intermediate_size": own["encoder.layer.0.intermediate_query.dense.weight"].shape[0],
        "encoder_hidden_size": own[keys[0]].shape[1],
        "cross_attention_frequency": -(-layers // len(keys)),
    }
    if instructed:
        sizes["vocab_size"] = own["embeddings.word_embeddings.weight"].shape[0]
        sizes["max_position_embeddings"] = own["embeddings.position_embeddings.weight"].shape[0]
        model = transformers.InstructBlipQFormerModel(transformers.InstructBlipQFormerConfig(**sizes)).eval()
    else:
        model = transformers.Blip2QFormerModel(transformers.Blip2QFormerConfig(**sizes)).eval()
    assert not model.load_state_dict(own, strict=False).missing_keys
    return model
