"""Pieces that the wrappers share. Activations are flat, (rows, width), so that a linear layer is one Gemm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blipstream_export.ops import rms_norm

HEAD_DIM_MULTIPLE = 8
"""ONNX Runtime's GroupQueryAttention wants head sizes that are multiples of this; smaller ones are padded by zeros,
which changes neither the scores nor the output."""


def padded_head_dim(head_dim: int) -> int:
    """The next multiple of :data:`HEAD_DIM_MULTIPLE`."""
    return -(-head_dim // HEAD_DIM_MULTIPLE) * HEAD_DIM_MULTIPLE


def embed_tokens(ids: Tensor, soft_tokens: Tensor, embedding: nn.Embedding) -> Tensor:
    """Embeddings (N, D) of ids (N,) int64, of which a negative one, -(1 + k), stands for row k of ``soft_tokens``."""
    soft = soft_tokens.index_select(0, torch.clamp(-1 - ids, min=0))
    words = embedding(torch.clamp(ids, min=0))
    return torch.where((ids < 0).unsqueeze(-1), soft, words)


class RMSNorm(nn.Module):
    """Root mean square normalisation of LLaMA and T5; the weight is that of ``source``."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.weight = source.weight
        self.epsilon = float(source.variance_epsilon)

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise hidden (..., C)."""
        return rms_norm(hidden, self.weight, self.epsilon)


def fuse_linear(parts: Sequence[nn.Linear]) -> nn.Linear:
    """One linear layer whose output is the concatenation of the outputs of ``parts``, in their order."""
    weight = torch.cat([part.weight.detach() for part in parts])
    bias = None
    if any(_has_bias(part) for part in parts):
        bias = torch.cat([_bias(part) for part in parts])
    return make_linear(weight, bias)


def make_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer around existing tensors, ``weight`` (out, in) and ``bias`` (out,); nothing is copied."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def affine_norm(norm: nn.LayerNorm) -> nn.LayerNorm:
    """The norm itself, or the same one with a weight of ones and a bias of zeros where it has none."""
    if norm.elementwise_affine and _has_bias(norm):
        return norm
    affine = nn.LayerNorm(norm.normalized_shape, eps=norm.eps)
    if norm.elementwise_affine:
        affine.weight = norm.weight
    return affine.requires_grad_(False)


def pad_head_rows(layer: nn.Linear, head_dim: int, padded: int) -> nn.Linear:
    """Widen each head of a projection's output from ``head_dim`` to ``padded`` by zeros."""
    if head_dim == padded:
        return layer
    weight = _pad_heads(layer.weight.detach(), head_dim, padded)
    bias = _pad_heads(layer.bias.detach(), head_dim, padded) if _has_bias(layer) else None
    return make_linear(weight, bias)


def pad_head_columns(layer: nn.Linear, head_dim: int, padded: int) -> nn.Linear:
    """Let a projection read heads that are ``padded`` wide, of which the first ``head_dim`` entries count."""
    if head_dim == padded:
        return layer
    weight = _pad_heads(layer.weight.detach().T, head_dim, padded).T.contiguous()
    return make_linear(weight, layer.bias.detach() if _has_bias(layer) else None)


def _pad_heads(x: Tensor, head_dim: int, padded: int) -> Tensor:
    heads = x.unflatten(0, (-1, head_dim))  # (H, D, ...)
    zeros = x.new_zeros(heads.shape[0], padded - head_dim, *x.shape[1:])
    return torch.cat([heads, zeros], dim=1).flatten(0, 1)


def _bias(layer: nn.Linear) -> Tensor:
    return layer.bias.detach() if _has_bias(layer) else layer.weight.new_zeros(layer.out_features)


def _has_bias(layer: nn.Linear | nn.LayerNorm) -> bool:
    bias: Tensor | None = layer.bias  # declared as a tensor, and None without bias
    return bias is not None
