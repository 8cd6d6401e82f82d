"""The Q-Former: learned queries read the image by cross-attention and become soft tokens of the language model.

In BLIP-2 the queries see each other and the image; in InstructBLIP (Dai et al., 2023, section 2.3) they also see the
tokens of an instruction, so that they can look for what it asks about. Activations are flat, (rows, width).
"""

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
        queries = _normed_queries(source, source.qformer.layernorm)
        first = _SelfAttention(copy.deepcopy(source.qformer.encoder.layer[0].attention).double())
        with torch.no_grad():
            self.queries = nn.Parameter(first(queries, 1).float(), requires_grad=False)  # (Q, C)
        layers[0].attention = None
        self.layers: Any = nn.ModuleList(layers)
        self.projection = _LanguageProjection(source)

    def forward(self, image_embeds: Tensor) -> Tensor:
        """Read images: image_embeds (B, T, C_vision) float32 -> soft_tokens (B, Q, D) float32."""
        batch = image_embeds.shape[0]
        image = image_embeds.flatten(0, 1)
        hidden = self.queries.expand(batch, -1, -1).flatten(0, 1)  # (B * Q, C)
        for index, layer in enumerate(self.layers):
            if index > 0:
                hidden = layer.attention(hidden, batch)
            hidden = layer.read_image(hidden, image, batch)
        return self.projection(hidden, batch)


class InstructionQFormer(nn.Module):
    """Query tokens, Q-Former and language projection of ``InstructBlipForConditionalGeneration``.

    Queries and instruction attend to each other in every layer; each has its own feed-forward, and the queries alone
    read the image. Behind the last self-attention nobody reads the instruction, and it is left out.

    Args:
        source: the model of transformers (``InstructBlipForConditionalGeneration``); its parameters are shared.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        *inner, last = source.qformer.encoder.layer
        embeddings = source.qformer.embeddings
        queries = _normed_queries(source, embeddings.layernorm)
        self.queries = nn.Parameter(queries.float(), requires_grad=False)  # (Q, C)
        self.words, self.positions = embeddings.word_embeddings, embeddings.position_embeddings
        self.norm = embeddings.layernorm
        self.layers: Any = nn.ModuleList([_InstructedLayer(layer) for layer in inner])
        self.last = _LastInstructedLayer(last)
        self.projection = _LanguageProjection(source)

    def forward(self, image_embeds: Tensor, qformer_input_ids: Tensor, qformer_attention_mask: Tensor) -> Tensor:
        """Read images with an instruction each.

        Args:
            image_embeds: (B, T, C_vision) float32.
            qformer_input_ids: (B, S) int64, ids of the Q-Former's tokenizer, padded to one length.
            qformer_attention_mask: (B, S) int64, 0 where an id is padding.

        Returns:
            soft_tokens (B, Q, D) float32.
        """
        batch, image = image_embeds.shape[0], image_embeds.flatten(0, 1)
        queries = self.queries.expand(batch, -1, -1)  # (B, Q, C)
        mask = torch.cat([qformer_attention_mask.new_ones(queries.shape[:2]), qformer_attention_mask], dim=1).int()
        text = self._embed(qformer_input_ids)  # (B, S, C)
        for layer in self.layers:
            queries, text = layer(queries, text, image, mask)
        return self.projection(self.last(queries, text, image, mask), batch)

    def _embed(self, ids: Tensor) -> Tensor:
        positions = self.positions(torch.arange(ids.shape[1]))  # (S, C)
        return self.norm(self.words(ids) + positions)


class _LanguageProjection(nn.Module):
    """From the queries' width to that of the language model's token embeddings."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.linear = source.language_projection
        self.num_queries = int(source.query_tokens.shape[1])
        self.embed_dim = int(source.language_model.get_input_embeddings().embedding_dim)

    def forward(self, hidden: Tensor, batch: int) -> Tensor:
        """(B * Q, C) -> soft_tokens (B, Q, D)"""
        projected = self.linear(hidden).reshape(batch, self.num_queries, -1)
        # transformers scatters the projection, as wide as the language model's hidden state, into token embeddings
        # element by element. Where embeddings are narrower, the first Q * D elements fill the Q soft tokens in order.
        if projected.shape[-1] == self.embed_dim:
            return projected
        flat = projected.flatten(1)[:, : self.num_queries * self.embed_dim]
        return flat.reshape(-1, self.num_queries, self.embed_dim)


def _normed_queries(source: Any, norm: nn.LayerNorm) -> Tensor:
    """What the queries are before the first layer: (Q, C) float64.

    In float64, so that the last bit of what is computed once does not depend on the number of threads or on the
    processor.
    """
    with torch.no_grad():
        queries: Tensor = copy.deepcopy(norm).double()(source.query_tokens.double())[0]
        return queries


class _QFormerLayer(nn.Module):
    """Self-attention, cross-attention (not in every layer) and feed-forward of the queries; post-norm, flat."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.attention: Any = _SelfAttention(source.attention)
        self.cross_attention = _CrossAttention(source.crossattention) if source.has_cross_attention else None
        self.feed_forward = _FeedForward(source.intermediate_query, source.output_query)

    def read_image(self, hidden: Tensor, image: Tensor, batch: int) -> Tensor:
        """All of the layer behind its self-attention: (B * Q, C) and image (B * T, C_vision) -> (B * Q, C)."""
        if self.cross_attention is not None:
            hidden = self.cross_attention(hidden, image, batch)
        return self.feed_forward(hidden)


class _InstructedLayer(_QFormerLayer):
    """A layer with a feed-forward for the instruction as well."""

    def __init__(self, source: Any) -> None:
        super().__init__(source)
        self.text_feed_forward = _FeedForward(source.intermediate, source.output)

    def forward(self, queries: Tensor, text: Tensor, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """queries (B, Q, C), text (B, S, C), image (B * T, C_vision), mask (B, Q + S) -> queries, text"""
        batch, num_queries, _ = queries.shape
        joint = torch.cat([queries, text], dim=1)  # (B, Q + S, C)
        attended = self.attention(joint.flatten(0, 1), batch, mask).reshape(joint.shape)
        read = self.read_image(attended[:, :num_queries].flatten(0, 1), image, batch)
        answered = self.text_feed_forward(attended[:, num_queries:].flatten(0, 1))
        return read.reshape(queries.shape), answered.reshape(text.shape)


class _LastInstructedLayer(_QFormerLayer):
    """The last layer, of which only the queries count: they read themselves and the instruction."""

    def __init__(self, source: Any) -> None:
        super().__init__(source)
        self.attention = _CrossAttention(source.attention)

    def forward(self, queries: Tensor, text: Tensor, image: Tensor, mask: Tensor) -> Tensor:
        """queries (B, Q, C), text (B, S, C), image (B * T, C_vision), mask (B, Q + S) -> (B * Q, C)"""
        batch = queries.shape[0]
        joint = torch.cat([queries, text], dim=1)  # (B, Q + S, C)
        return self.read_image(self.attention(queries.flatten(0, 1), joint.flatten(0, 1), batch, mask), image, batch)


class _FeedForward(nn.Module):
    def __init__(self, intermediate: Any, output: Any) -> None:
        super().__init__()
        self.fc1, self.activation = intermediate.dense, intermediate.intermediate_act_fn
        self.fc2, self.norm = output.dense, output.LayerNorm

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(self.fc2(self.activation(self.fc1(hidden))) + hidden)


class _Attention(nn.Module):
    """The output half of both attentions: projection, residual, norm."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.num_heads, self.scale = int(source.attention.num_attention_heads), float(source.attention.scaling)
        self.dense, self.norm = source.output.dense, source.output.LayerNorm

    def attend(self, residual: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        attended = attention(query, key, value, self.num_heads, self.scale, mask)
        return self.norm(self.dense(attended.flatten(0, 1)) + residual)


class _SelfAttention(_Attention):
    def __init__(self, source: Any) -> None:
        super().__init__(source)
        self.qkv = fuse_linear([source.attention.query, source.attention.key, source.attention.value])

    def forward(self, hidden: Tensor, batch: int, mask: Tensor | None = None) -> Tensor:
        query, key, value = self.qkv(hidden).reshape(batch, -1, self.qkv.out_features).chunk(3, dim=-1)
        return self.attend(hidden, query, key, value, mask)


class _CrossAttention(_Attention):
    def __init__(self, source: Any) -> None:
        super().__init__(source)
        self.query = source.attention.query
        self.key_value = fuse_linear([source.attention.key, source.attention.value])

    def forward(self, hidden: Tensor, context: Tensor, batch: int, mask: Tensor | None = None) -> Tensor:
        query = self.query(hidden).reshape(batch, -1, self.query.out_features)
        key, value = self.key_value(context).reshape(batch, -1, self.key_value.out_features).chunk(2, dim=-1)
        return self.attend(hidden, query, key, value, mask)
