"""Attention as torch custom operators: one eager reference each, lowered per engine at export.

The wrappers of :mod:`blipstream_export.models` call these operators. Run eagerly they compute by plain torch, which is
what tests compare with; at export a *lowering* (:mod:`blipstream_export.lowering`) translates each into the node that
the target engine runs fastest.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("blipstream::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    scale: float,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Multi-head attention, bidirectional.

    Args:
        query: (B, S, H * D).
        key: (B, L, H * D).
        value: (B, L, H * D).
        num_heads: H.
        scale: factor of the scores before the softmax.
        key_padding_mask: (B, L) int32, 0 where a key is padding, which nothing attends to; by default none is.

    Returns:
        (B, S, H * D).
    """
    q, k, v = (_split_heads(x, num_heads) for x in (query, key, value))
    scores = (q * scale) @ k.transpose(2, 3)  # (B, H, S, L)
    if key_padding_mask is not None:
        scores = scores.masked_fill(key_padding_mask[:, None, None] == 0, float("-inf"))
    return _join_heads(torch.softmax(scores, dim=-1) @ v)


@attention.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return torch.empty_like(query)


@torch.library.custom_op("blipstream::cached_attention", mutates_args=())
def cached_attention(
    qkv: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    seqlens_k: Tensor,
    total_sequence_length: Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Append to a KV cache and attend causally to it, each row at its own length.

    A call is a prefill (S equals ``total_sequence_length``: rows start empty and are padded on the right) or a decode
    step (S = 1). This is the behaviour of com.microsoft ``GroupQueryAttention``, which updates the cache in place.

    Args:
        qkv: (B, S, (H + 2 * H_kv) * D) queries, keys and values, in this order.
        past_key: (B, H_kv, T, D) the cache before this call.
        past_value: (B, H_kv, T, D).
        seqlens_k: (B,) int32, tokens in each row after this call, minus one.
        total_sequence_length: () int32, the largest of ``seqlens_k + 1``.
        num_heads: H.
        num_kv_heads: H_kv, a divisor of H.
        scale: factor of the scores before the softmax.

    Returns:
        The attention's output (B, S, H * D), and key and value with this call's tokens written. Outputs of padding,
        and cache entries behind a row's length, are of no meaning.
    """
    batch, length, _ = qkv.shape
    head_dim = past_key.shape[-1]
    sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
    query, new_key, new_value = torch.split(qkv, sizes, dim=-1)
    ends = seqlens_k.long() + 1  # (B,)
    starts = torch.zeros_like(ends) if length == int(total_sequence_length) else ends - length
    positions = starts[:, None] + torch.arange(length)  # (B, S)
    rows = torch.arange(batch)[:, None]
    key, value = past_key.clone(), past_value.clone()
    key[rows, :, positions] = new_key.reshape(batch, length, num_kv_heads, head_dim)
    value[rows, :, positions] = new_value.reshape(batch, length, num_kv_heads, head_dim)

    group = num_heads // num_kv_heads
    k, v = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)  # (B, H, T, D)
    scores = (_split_heads(query, num_heads) * scale) @ k.transpose(2, 3)  # (B, H, S, T)
    visible = torch.arange(key.shape[2]) <= positions[..., None]  # (B, S, T)
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    return _join_heads(torch.softmax(scores, dim=-1) @ v), key, value


@cached_attention.register_fake
def _(
    qkv: Tensor, past_key: Tensor, past_value: Tensor, _lengths: Tensor, _longest: Tensor, num_heads: int, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    output = qkv.new_empty(qkv.shape[0], qkv.shape[1], num_heads * past_key.shape[-1])
    return output, torch.empty_like(past_key), torch.empty_like(past_value)


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], num_heads, -1).transpose(1, 2)  # (B, H, S, D)


def _join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # (B, S, H * D)
