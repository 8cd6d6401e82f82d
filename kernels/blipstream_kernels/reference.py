"""Cross-attention in plain torch: what the kernels are compared with.

In fp64 (or fp32) it is the truth; in the inputs' own dtype it is the yardstick of how large an error may be. It follows
``Blip2QFormerMultiHeadAttention`` of Hugging Face transformers: both projections with their biases, and masked scores
at the smallest finite number, so that a row whose keys are all masked gets the mean of all values.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cross_attention(
    query: Tensor,
    image: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    num_heads: int,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Project keys and values, and attend to them.

    Args:
        query: (B, Q, H * D), projected.
        image: (B, N, C).
        key_weight: (H * D, C).
        key_bias: (H * D,).
        value_weight: (H * D, C).
        value_bias: (H * D,).
        num_heads: H.
        scale: factor of the scores before the softmax; by default D ** -0.5.
        key_mask: (B, N) bool or integers, False or 0 where a key is masked.
        dtype: what everything is computed in; by default the inputs' own.

    Returns:
        (B, Q, H * D), before the output projection.
    """
    tensors = (query, image, key_weight, key_bias, value_weight, value_bias)
    query, image, key_weight, key_bias, value_weight, value_bias = (x.to(dtype or x.dtype) for x in tensors)
    q, k, v = (
        x.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, H, Q or N, D)
        for x in (query, image @ key_weight.T + key_bias, image @ value_weight.T + value_bias)
    )
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)  # (B, H, Q, N)
    if key_mask is not None:
        scores = scores.masked_fill(key_mask[:, None, None] == 0, torch.finfo(scores.dtype).min)
    return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)
