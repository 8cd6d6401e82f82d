"""LLaMA as a decoder for serving: one graph for prefill and decode step (see ``blipstream.contract``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from blipstream.contract import DECODER_FILE
from blipstream.errors import UnsupportedCheckpointError
from blipstream.manifest import DecoderSection
from blipstream_export.graphs import Graph, decoder_inputs
from blipstream_export.models.causal import CausalDecoder
from blipstream_export.models.layers import (
    RMSNorm,
    embed_tokens,
    fuse_linear,
    pad_head_columns,
    pad_head_rows,
    padded_head_dim,
)
from blipstream_export.ops import cached_attention

_FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional")
"""Rotary embeddings whose angle at a position is the same in every sequence."""


def check_config(config: Any, source: str) -> None:
    """See :class:`~blipstream_export.families.LanguageModule`."""
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in _FIXED_ROPE_TYPES:
        raise UnsupportedCheckpointError(
            f"the language model of {source} has rotary positions of type {rope_type!r}, and only those are served "
            f"whose angles do not depend on the length of the sequence: {', '.join(_FIXED_ROPE_TYPES)}"
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise UnsupportedCheckpointError(
            f"the language model of {source} has {config.num_attention_heads} attention heads, which cannot share "
            f"{config.num_key_value_heads} key and value heads evenly"
        )
    share = config.rope_parameters.get("partial_rotary_factor", 1.0)
    if share != 1.0 and rope_type not in ("default", "proportional"):
        raise UnsupportedCheckpointError(
            f"the language model of {source} has rotary positions of type {rope_type!r} with partial_rotary_factor = "
            f"{share}, which LLaMA in transformers cannot run either"
        )


def max_positions(config: Any) -> int:
    """See :class:`~blipstream_export.families.LanguageModule`."""
    return int(config.max_position_embeddings)


def decoder_section(config: Any, *, max_sequences: int, max_tokens: int) -> DecoderSection:
    """See :class:`~blipstream_export.families.LanguageModule`."""
    return DecoderSection(
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=2 * padded_head_dim(config.head_dim // 2),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_sequences=max_sequences,
        max_tokens=max_tokens,
    )


def graphs(model: Any, sizes: DecoderSection) -> Iterator[Graph]:
    """See :class:`~blipstream_export.families.LanguageModule`."""
    yield Graph(DECODER_FILE, LlamaDecoder(model, sizes.max_tokens), decoder_inputs(sizes))


class LlamaDecoder(CausalDecoder):
    """``LlamaForCausalLM`` with its KV cache as inputs and outputs, every variant of the architecture.

    Args:
        source: the model of transformers (``LlamaForCausalLM``); parameters are shared where their layout stays.
        max_tokens: positions for which the rotary embedding is computed.
    """

    def __init__(self, source: Any, max_tokens: int) -> None:
        super().__init__()
        model = source.model
        self.embed_tokens = model.embed_tokens
        rotary = RotaryEmbedding(model.rotary_emb, max_tokens)
        self.layers = nn.ModuleList()
        for layer in model.layers:
            self.layers.append(_LlamaLayer(layer, rotary))
        self.final_norm = RMSNorm(model.norm)
        tied = source.lm_head.weight is self.embed_tokens.weight
        self.lm_head = None if tied else source.lm_head  # one name for a tied tensor, so that nothing holds another

    def embed(self, ids: Tensor, soft_tokens: Tensor, positions: Tensor) -> Tensor:
        """See :class:`CausalDecoder`."""
        del positions  # attention knows them from the rows' lengths
        return embed_tokens(ids, soft_tokens, self.embed_tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """See :class:`CausalDecoder`."""
        return nn.functional.linear(self.final_norm(hidden), (self.lm_head or self.embed_tokens).weight)


class RotaryEmbedding(nn.Module):
    """Cosine and sine (P, D / 2) of every position's angles, as the model's own rotary embedding computes them.

    Args:
        source: the module of transformers, whose scaling of angles comes along.
        max_tokens: P.
    """

    def __init__(self, source: Any, max_tokens: int) -> None:
        super().__init__()
        with torch.no_grad():
            cos, sin = source(torch.zeros(1), torch.arange(max_tokens)[None])  # (1, P, D): both halves are the same
        half = cos.shape[-1] // 2
        self.padding = padded_head_dim(half) - half
        self.cos, self.sin = (self._table(x[0, :, :half]) for x in (cos, sin))

    def _table(self, x: Tensor) -> nn.Parameter:
        return nn.Parameter(nn.functional.pad(x, (0, self.padding)), requires_grad=False)


class _LlamaLayer(nn.Module):
    """One layer on flat activations (B * S, C).

    The rotary embedding turns the first half of a head against the second, so that each half is padded by itself.
    """

    def __init__(self, source: Any, rotary: RotaryEmbedding) -> None:
        super().__init__()
        heads, feed_forward = source.self_attn, source.mlp
        half = heads.head_dim // 2
        padded = half + rotary.padding
        self.head_dim = 2 * padded
        self.num_heads = heads.q_proj.out_features // heads.head_dim
        self.num_kv_heads = heads.k_proj.out_features // heads.head_dim
        self.scale = float(heads.scaling)
        self.rotary = rotary
        self.attention_norm = RMSNorm(source.input_layernorm)
        self.qkv = fuse_linear([pad_head_rows(x, half, padded) for x in (heads.q_proj, heads.k_proj, heads.v_proj)])
        self.out_proj = pad_head_columns(heads.o_proj, half, padded)
        self.feed_forward_norm = RMSNorm(source.post_attention_layernorm)
        self.gate_up = fuse_linear([feed_forward.gate_proj, feed_forward.up_proj])
        self.activation, self.down = feed_forward.act_fn, feed_forward.down_proj

    def attend(
        self, hidden: Tensor, batch: int, key: Tensor, value: Tensor, seqlens_k: Tensor, total_sequence_length: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`CausalDecoder`."""
        qkv = self.qkv(self.attention_norm(hidden)).reshape(batch, -1, self.qkv.out_features)
        attended, key, value = cached_attention(
            qkv,
            key,
            value,
            seqlens_k,
            total_sequence_length,
            self.num_heads,
            self.num_kv_heads,
            self.scale,
            self.rotary.cos,
            self.rotary.sin,
        )
        return attended.flatten(0, 1), key, value

    def feed_forward(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """See :class:`CausalDecoder`."""
        hidden = hidden + self.out_proj(attended)
        gate, up = self.gate_up(self.feed_forward_norm(hidden)).chunk(2, dim=-1)
        return hidden + self.down(self.activation(gate) * up)
