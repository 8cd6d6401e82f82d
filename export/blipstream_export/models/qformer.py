"""The Q-Former: learned queries read the image by cross-attention and become soft tokens of the language model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from blipstream_export.models.layers import fuse_linear
from blipstream_export.ops import attention


class QFormer(nn.Module):
    """Query tokens, Q-Former and language projection of ``Blip2ForConditionalGeneration``.

    What does not depend on the image (the queries' norm, the first layer's self-attention) is computed once, here.

    Args:
        source: the model of transformers (``Blip2ForConditionalGeneration``); its parameters are shared.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        layers = [_QFormerLayer(layer) for layer in source.qformer.encoder.layer]
        self.projection = source.language_projection
        self.embed_dim = int(source.language_model.get_input_embeddings().embedding_dim)
        queries = _first_self_attention(source)  # (Q, C)
        self.num_queries = int(queries.shape[0])
        self.queries = nn.Parameter(queries, requires_grad=False)
        layers[0].attention = None
        self.layers: Any = nn.ModuleList(layers)

    def forward(self, image_embeds: Tensor) -> Tensor:
        """Read images: image_embeds (B, T, C_vision) float32 -> soft_tokens (B, Q, D) float32."""
        batch = image_embeds.shape[0]
        image = image_embeds.flatten(0, 1)
        hidden = self.queries.expand(batch, -1, -1).flatten(0, 1)  # (B * Q, C)
        for index, layer in enumerate(self.layers):
            if index > 0:
                hidden = layer.self_attention(hidden, batch)
            hidden = layer.read_image(hidden, image, batch)
        projected = self.projection(hidden).reshape(batch, self.num_queries, -1)
        return self._at_embedding_width(projected)

    def _at_embedding_width(self, projected: Tensor) -> Tensor:
        # transformers scatters the projection, as wide as the language model's hidden state, into token embeddings
        # element by element. Where embeddings are narrower, the first Q * D elements fill the Q soft tokens in order.
        if projected.shape[-1] == self.embed_dim:
            return projected
        flat = projected.flatten(1)[:, : self.num_queries * self.embed_dim]
        return flat.reshape(-1, self.num_queries, self.embed_dim)


def _first_self_attention(source: Any) -> Tensor:
    """What the queries are before they first see an image: (Q, C) float32.

    In float64, so that the last bit does not depend on the number of threads or on the processor.
    """
    norm, layer = copy.deepcopy(source.qformer.layernorm), copy.deepcopy(source.qformer.encoder.layer[0].attention)
    with torch.no_grad():
        queries = norm.double()(source.query_tokens.double())[0]
        return _SelfAttention(layer.double())(queries, 1).float()


class _QFormerLayer(nn.Module):
    """Self-attention, cross-attention (not in every layer) and feed-forward of the queries; post-norm, flat."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.attention: _SelfAttention | None = _SelfAttention(source.attention)
        self.cross_attention = _CrossAttention(source.crossattention) if source.has_cross_attention else None
        self.fc1 = source.intermediate_query.dense
        self.activation = source.intermediate_query.intermediate_act_fn
        self.fc2, self.norm = source.output_query.dense, source.output_query.LayerNorm

    def self_attention(self, hidden: Tensor, batch: int) -> Tensor:
        assert self.attention is not None
        return self.attention(hidden, batch)

    def read_image(self, hidden: Tensor, image: Tensor, batch: int) -> Tensor:
        if self.cross_attention is not None:
            hidden = self.cross_attention(hidden, image, batch)
        return self.norm(self.fc2(self.activation(self.fc1(hidden))) + hidden)


class _Attention(nn.Module):
    """The output half of both attentions: projection, residual, norm."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.num_heads, self.scale = int(source.attention.num_attention_heads), float(source.attention.scaling)
        self.dense, self.norm = source.output.dense, source.output.LayerNorm

    def attend(self, residual: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended = attention(query, key, value, self.num_heads, self.scale)
        return self.norm(self.dense(attended.flatten(0, 1)) + residual)


class _SelfAttention(_Attention):
    def __init__(self, source: Any) -> None:
        super().__init__(source)
        self.qkv = fuse_linear([source.attention.query, source.attention.key, source.attention.value])

    def forward(self, hidden: Tensor, batch: int) -> Tensor:
        query, key, value = self.qkv(hidden).reshape(batch, -1, self.qkv.out_features).chunk(3, dim=-1)
        return self.attend(hidden, query, key, value)


class _CrossAttention(_Attention):
    def __init__(self, source: Any) -> None:
        super().__init__(source)
        self.query = source.attention.query
        self.key_value = fuse_linear([source.attention.key, source.attention.value])

    def forward(self, hidden: Tensor, image: Tensor, batch: int) -> Tensor:
        query = self.query(hidden).reshape(batch, -1, self.query.out_features)
        key, value = self.key_value(image).reshape(batch, -1, self.key_value.out_features).chunk(2, dim=-1)
        return self.attend(hidden, query, key, value)
