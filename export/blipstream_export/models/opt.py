"""OPT as a decoder for serving: one graph for prefill and decode step (see ``blipstream.contract``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from blipstream.contract import DECODER_FILE
from blipstream.errors import UnsupportedCheckpointError
from blipstream.manifest import DecoderSection
from blipstream_export.graphs import Graph, decoder_inputs
from blipstream_export.models.causal import CausalDecoder
from blipstream_export.models.layers import (
    affine_norm,
    embed_tokens,
    fuse_linear,
    pad_head_columns,
    pad_head_rows,
    padded_head_dim,
)
from blipstream_export.ops import cached_attention


def check_config(config: Any, source: str) -> None:
    """See :class:`~blipstream_export.families.LanguageModule`."""
    if config.word_embed_proj_dim > config.hidden_size:
        raise UnsupportedCheckpointError(
            f"the language model of {source} has embeddings of width {config.word_embed_proj_dim}, wider than its "
            f"hidden state of {config.hidden_size}: transformers cannot place soft tokens among them either"
        )


def max_positions(config: Any) -> int:
    """See :class:`~blipstream_export.families.LanguageModule`."""
    return int(config.max_position_embeddings)


def decoder_section(config: Any, *, max_sequences: int, max_tokens: int) -> DecoderSection:
    """See :class:`~blipstream_export.families.LanguageModule`."""
    return DecoderSection(
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        num_key_value_heads=config.num_attention_heads,
        head_dim=padded_head_dim(config.hidden_size // config.num_attention_heads),
        hidden_size=config.word_embed_proj_dim,
        vocab_size=config.vocab_size,
        max_sequences=max_sequences,
        max_tokens=max_tokens,
    )


def graphs(model: Any, sizes: DecoderSection) -> Iterator[Graph]:
    """See :class:`~blipstream_export.families.LanguageModule`."""
    yield Graph(DECODER_FILE, OPTDecoder(model), decoder_inputs(sizes))


class OPTDecoder(CausalDecoder):
    """``OPTForCausalLM`` with its KV cache as inputs and outputs, every variant of the architecture.

    Args:
        source: the model of transformers (``OPTForCausalLM``); parameters are shared where their layout stays.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        decoder = source.model.decoder
        offset = decoder.embed_positions.offset
        self.embed_tokens = decoder.embed_tokens
        self.positions = nn.Parameter(decoder.embed_positions.weight.detach()[offset:].clone(), requires_grad=False)
        self.project_in, self.project_out = decoder.project_in, decoder.project_out
        self.layers: Any = nn.ModuleList()
        for layer in decoder.layers:
            self.layers.append(_OPTLayer(layer))
        norm = decoder.final_layer_norm
        self.final_norm = None if norm is None else affine_norm(norm)
        tied = source.lm_head.weight is self.embed_tokens.weight
        self.lm_head = None if tied else source.lm_head  # one name for a tied tensor, so that nothing holds another

    def embed(self, ids: Tensor, soft_tokens: Tensor, positions: Tensor) -> Tensor:
        """See :class:`CausalDecoder`."""
        embedded = embed_tokens(ids, soft_tokens, self.embed_tokens)
        if self.project_in is not None:
            embedded = self.project_in(embedded)
        return embedded + self.positions.index_select(0, positions)

    def logits(self, hidden: Tensor) -> Tensor:
        """See :class:`CausalDecoder`."""
        if self.final_norm is not None:
            hidden = self.final_norm(hidden)
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        return nn.functional.linear(hidden, (self.lm_head or self.embed_tokens).weight)


class _OPTLayer(nn.Module):
    """One layer on flat activations (B * S, C); the norms stand before or behind attention and feed-forward."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        heads = source.self_attn
        self.pre_norm = bool(source.do_layer_norm_before)
        self.num_heads = int(heads.num_heads)
        self.scale = float(heads.scaling)
        self.head_dim = padded_head_dim(heads.head_dim)
        inputs = (heads.q_proj, heads.k_proj, heads.v_proj)
        self.qkv = fuse_linear([pad_head_rows(part, heads.head_dim, self.head_dim) for part in inputs])
        self.out_proj = pad_head_columns(heads.out_proj, heads.head_dim, self.head_dim)
        self.attention_norm = affine_norm(source.self_attn_layer_norm)
        self.fc1, self.activation, self.fc2 = source.fc1, source.activation_fn, source.fc2
        self.final_norm = affine_norm(source.final_layer_norm)

    def attend(
        self, hidden: Tensor, batch: int, key: Tensor, value: Tensor, seqlens_k: Tensor, total_sequence_length: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`CausalDecoder`."""
        normed = self.attention_norm(hidden) if self.pre_norm else hidden
        qkv = self.qkv(normed).reshape(batch, -1, self.qkv.out_features)
        attended, key, value = cached_attention(
            qkv, key, value, seqlens_k, total_sequence_length, self.num_heads, self.num_heads, self.scale
        )
        return attended.flatten(0, 1), key, value

    def feed_forward(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """See :class:`CausalDecoder`."""
        hidden = hidden + self.out_proj(attended)
        if not self.pre_norm:
            hidden = self.attention_norm(hidden)
        normed = self.final_norm(hidden) if self.pre_norm else hidden
        hidden = hidden + self.fc2(self.activation(self.fc1(normed)))
        return hidden if self.pre_norm else self.final_norm(hidden)
