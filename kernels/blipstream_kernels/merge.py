"""Joins the splits of a cross-attention (the second step of Flash-Decoding: Dao et al., 2023).

Each split wrote its context, not normalised, with the maximum m and the sum l of its softmax. Theirs together is the
sum of ``exp2(m_s - m) context_s`` over the sum of ``exp2(m_s - m) l_s``, where m is the largest m_s. Maximum and sum
stay apart, rather than in one log-sum-exp: next to the score of masked keys the logarithm of their number would be
rounded away, and rows whose keys are all masked would weigh splits of unequal length wrongly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blipstream_kernels.tiles import load_bias, store_output


@triton.jit
def merge(
    partial,
    statistics,
    value_bias,
    splits,
    heads,
    queries,
    output,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Join the splits of one head and add the value bias; the grid is (B * H, ceil(Q / BLOCK_Q)).

    Args:
        partial: (B, H, S, Q, D) fp32.
        statistics: (B, H, S, 2, Q) fp32: maximum and sum, see :func:`blipstream_kernels.tiles.store_partial`.
        value_bias: (H * D,).
        splits: S.
        heads: H.
        queries: Q.
        output: (B, Q, H * D).
        HEAD_DIM: D, a power of two.
        BLOCK_Q: queries of a program.
    """
    batch_head = tl.program_id(0)
    row = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    dim = tl.arange(0, HEAD_DIM)
    inside = row < queries
    partial += batch_head.to(tl.int64) * splits * queries * HEAD_DIM
    statistics += batch_head.to(tl.int64) * splits * 2 * queries

    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    context = tl.zeros((BLOCK_Q, HEAD_DIM), tl.float32)
    for split in range(splits):
        largest_there = tl.load(statistics + split * 2 * queries + row, mask=inside, other=0.0)
        total_there = tl.load(statistics + (split * 2 + 1) * queries + row, mask=inside, other=1.0)
        place = (split * queries + row[:, None]) * HEAD_DIM + dim[None, :]
        context_there = tl.load(partial + place, mask=inside[:, None], other=0.0)
        largest_now = tl.maximum(largest, largest_there)
        decay, share = tl.exp2(largest - largest_now), tl.exp2(largest_there - largest_now)
        total = total * decay + total_there * share
        context = context * decay[:, None] + context_there * share[:, None]
        largest = largest_now

    context = context / total[:, None] + load_bias(value_bias, batch_head % heads, HEAD_DIM)
    store_output(output, context, batch_head // heads, batch_head % heads, row, heads, queries, HEAD_DIM)
