"""Attention, and what belongs to it, as torch custom operators: one eager reference each, lowered per engine at export.

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
    bias: Tensor | None = None,
) -> Tensor:
    """Multi-head attention, bidirectional.

    Args:
        query: (B, S, H * D).
        key: (B, L, H * D).
        value: (B, L, H * D).
        num_heads: H.
        scale: factor of the scores before the softmax.
        key_padding_mask: (B, L) int32, 0 where a key is padding, which nothing attends to; by default none is.
        bias: (1, H, S, L), added to the scores of every row.

    Returns:
        (B, S, H * D).
    """
    q, k, v = (_split_heads(x, num_heads) for x in (query, key, value))
    scores = (q * scale) @ k.transpose(2, 3)  # (B, H, S, L)
    if bias is not None:
        scores = scores + bias
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
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Append to a KV cache and attend causally to it, each row at its own length.

    A call is a prefill (S equals ``total_sequence_length``: rows start empty and are padded on the right) or a decode
    step (S = 1). This is the behaviour of com.microsoft ``GroupQueryAttention``, which updates the cache in place.

    Args:
        qkv: (B, S, (H + 2 * H_kv) * D) queries, keys and values, in this order.
        past_key: (B, H_kv, T, D) the cache before this call.
        past_value: (B, H_kv, T, D).
        seqlens_k: (B,) int32, tokens in each row after this call, minus one.
        total_sequence_length: () int32, L, the largest of ``seqlens_k + 1``.
        num_heads: H.
        num_kv_heads: H_kv, a divisor of H.
        scale: factor of the scores before the softmax.
        cos: (P, D / 2), with ``sin`` the rotary embedding of position p in row p: queries and keys are rotated, the
            first half of each head against the second (RoFormer, section 3.4.2).
        sin: (P, D / 2).
        bias: (B, H, S, L), added to the scores of the row's tokens 0..L - 1.

    Returns:
        The attention's output (B, S, H * D), and key and value with this call's tokens written. Outputs of padding,
        and cache entries behind a row's length, are of no meaning.
    """
    batch, length, _ = qkv.shape
    head_dim = past_key.shape[-1]
    sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
    query, new_key, new_value = (
        part.reshape(batch, length, -1, head_dim) for part in torch.split(qkv, sizes, dim=-1)
    )  # (B, S, heads, D)
    ends = seqlens_k.long() + 1  # (B,)
    starts = torch.zeros_like(ends) if length == int(total_sequence_length) else ends - length
    positions = starts[:, None] + torch.arange(length)  # (B, S)
    if cos is not None and sin is not None:
        query, new_key = (_rotate(x, cos[positions], sin[positions]) for x in (query, new_key))
    rows = torch.arange(batch)[:, None]
    key, value = past_key.clone(), past_value.clone()
    key[rows, :, positions] = new_key
    value[rows, :, positions] = new_value

    group = num_heads // num_kv_heads
    k, v = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)  # (B, H, T, D)
    scores = (query.transpose(1, 2) * scale) @ k.transpose(2, 3)  # (B, H, S, T)
    if bias is not None:
        scores[..., : bias.shape[-1]] += bias
    visible = torch.arange(key.shape[2]) <= positions[..., None]  # (B, S, T)
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    return _join_heads(torch.softmax(scores, dim=-1) @ v), key, value


@cached_attention.register_fake
def _(
    qkv: Tensor, past_key: Tensor, past_value: Tensor, _lengths: Tensor, _longest: Tensor, num_heads: int, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    output = qkv.new_empty(qkv.shape[0], qkv.shape[1], num_heads * past_key.shape[-1])
    return output, torch.empty_like(past_key), torch.empty_like(past_value)


@torch.library.custom_op("blipstream::cross_attention", mutates_args=())
def cross_attention(
    query: Tensor, key: Tensor, value: Tensor, seqlens_k: Tensor, total_sequence_length: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend with one token a row to a cache that is complete, each row to its own length.

    Args:
        query: (B, 1, H * D).
        key: (B, H, T, D) the cache; entries behind a row's length are of no meaning and never read.
        value: (B, H, T, D).
        seqlens_k: (B,) int32, valid entries of each row, minus one.
        total_sequence_length: () int32, the largest of ``seqlens_k + 1``.
        scale: factor of the scores before the softmax.

    Returns:
        The attention's output (B, 1, H * D), and key and value, unchanged: a graph gives them out again, so that an
        engine whose operator updates a cache may write where it reads.
    """
    longest = int(total_sequence_length)
    valid = torch.arange(longest) <= seqlens_k[:, None]  # (B, L)
    k, v = (x[:, :, :longest].masked_fill(~valid[:, None, :, None], 0.0) for x in (key, value))
    scores = (_split_heads(query, key.shape[1]) * scale) @ k.transpose(2, 3)  # (B, H, 1, L)
    scores = scores.masked_fill(~valid[:, None, None], float("-inf"))
    return _join_heads(torch.softmax(scores, dim=-1) @ v), key.clone(), value.clone()


@cross_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@torch.library.custom_op("blipstream::distance_bias", mutates_args=())
def distance_bias(table: Tensor, position_ids: Tensor, total_sequence_length: Tensor, cache: Tensor) -> Tensor:
    """What a token adds to its scores for earlier tokens, by their distance: a bias for :func:`cached_attention`.

    Args:
        table: (R, H), a row for each distance from 0; its last row stands for every larger distance.
        position_ids: (B, 1) int64, position of each row's token.
        total_sequence_length: () int32, L.
        cache: (B, H, T, D), that of the tokens which the bias is for; an engine whose shapes are fixed gives T entries
            in place of L.

    Returns:
        (B, H, 1, L). Entries for later tokens are of no meaning.
    """
    del cache
    distances = position_ids - torch.arange(int(total_sequence_length))  # (B, L)
    return table[distances.clamp(0, len(table) - 1)].transpose(1, 2).unsqueeze(2)


@distance_bias.register_fake
def _(table: Tensor, position_ids: Tensor, _longest: Tensor, _cache: Tensor) -> Tensor:
    longest = torch.library.get_ctx().new_dynamic_size()
    return table.new_empty(position_ids.shape[0], table.shape[1], 1, longest)


@torch.library.custom_op("blipstream::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root mean square normalisation (Zhang and Sennrich, 2019): x (..., C) over its last axis, times weight (C,)."""
    mean_square = x.float().square().mean(-1, keepdim=True)
    return weight * (x * torch.rsqrt(mean_square + epsilon)).to(weight.dtype)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, _epsilon: float) -> Tensor:
    return torch.empty_like(x, dtype=weight.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[d], x[d + D / 2]) of x (B, S, H, D) by angles of which (B, S, D / 2) are cosine and sine."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], num_heads, -1).transpose(1, 2)  # (B, H, S, D)


def _join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # (B, S, H * D)
