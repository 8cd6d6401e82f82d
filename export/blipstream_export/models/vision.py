"""The vision encoder: a ViT whose patches are read by the Q-Former."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from blipstream_export.ops import attention


class VisionEncoder(nn.Module):
    """``last_hidden_state`` of ``Blip2VisionModel``: the class token and every patch, normalised.

    Args:
        source: the model of transformers (``Blip2VisionModel``); its parameters are shared, not copied. Its embeddings
            may have a norm of their own, ``pre_norm``, as CLIP's ViT has.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        embeddings = source.embeddings
        position = embeddings.position_embedding.detach()  # (1, 1 + P, C)
        self.patch_embedding = embeddings.patch_embedding
        self.class_token = nn.Parameter(embeddings.class_embedding.detach() + position[:, :1], requires_grad=False)
        self.patch_position = nn.Parameter(position[:, 1:].contiguous(), requires_grad=False)
        self.pre_norm = getattr(embeddings, "pre_norm", None)
        self.layers: Any = nn.ModuleList([_VisionLayer(layer) for layer in source.encoder.layers])
        self.norm = source.post_layernorm

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images: pixel_values (B, 3, size, size) float32 -> image_embeds (B, 1 + P, C) float32."""
        batch = pixel_values.shape[0]
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2) + self.patch_position  # (B, P, C)
        tokens = torch.cat([self.class_token.expand(batch, -1, -1), patches], dim=1)  # (B, 1 + P, C)
        hidden = tokens.flatten(0, 1)
        if self.pre_norm is not None:
            hidden = self.pre_norm(hidden)
        for layer in self.layers:
            hidden = layer(hidden, batch)
        return self.norm(hidden).reshape(tokens.shape)


class _VisionLayer(nn.Module):
    """A pre-norm block on flat activations (B * T, C)."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = source.layer_norm1, source.layer_norm2
        self.qkv, self.projection = source.self_attn.qkv, source.self_attn.projection
        self.num_heads, self.scale = int(source.self_attn.num_heads), float(source.self_attn.scale)
        self.fc1, self.activation, self.fc2 = source.mlp.fc1, source.mlp.activation_fn, source.mlp.fc2

    def forward(self, hidden: Tensor, batch: int) -> Tensor:
        qkv = self.qkv(self.norm1(hidden)).reshape(batch, -1, self.qkv.out_features)
        query, key, value = qkv.chunk(3, dim=-1)  # (B, T, C) each
        attended = attention(query, key, value, self.num_heads, self.scale)
        hidden = hidden + self.projection(attended.flatten(0, 1))
        return hidden + self.fc2(self.activation(self.fc1(self.norm2(hidden))))
