"""Cross-attention with the keys and values projected on the fly: the *projected* form.

One program has one head of one image, a range of its tokens (a *split*) and a block of queries. For each block of n
tokens X (n, C) it computes keys ``X W_k^T`` and values ``X W_v^T`` (n, D), chunk by chunk of C, keeps them on the chip,
and attends to them with the online softmax of FlashAttention (Dao et al., 2022, section 3.1). Keys and values are never
written to memory.

Multiply-adds a block: ``2 n C D`` for the projections and ``2 Q n D`` for the attention. Nothing depends on the block's
length twice, so blocks may be short. See :mod:`blipstream_kernels.absorbed` for the other form, and ``docs/kernels.md``
for both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blipstream_kernels.tiles import (
    LOG2_E,
    dot,
    load_query,
    load_tokens,
    load_weight,
    mask_scores,
    store_result,
)


@triton.jit
def projected(
    query,
    image,
    key_weight,
    value_weight,
    value_bias,
    key_mask,
    tokens,
    tokens_per_split,
    query_stride_b,
    query_stride_q,
    image_stride_b,
    image_stride_n,
    key_weight_stride,
    value_weight_stride,
    mask_stride_b,
    heads,
    queries,
    width,
    output,
    statistics,
    SCALE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend to one split of the tokens; the grid is (B * H, splits, ceil(Q / BLOCK_Q)).

    Inputs come first, then integers, then outputs, as TensorRT passes them.

    Args:
        query: (B, Q, H * D), projected.
        image: (B, N, C), of the dtype of ``query``, as are the weights and the bias.
        key_weight: (H * D, C).
        value_weight: (H * D, C).
        value_bias: (H * D,), or None for a split, to which the merge adds it.
        key_mask: (B, N) integers, 0 where a key is masked; or None.
        tokens: N.
        tokens_per_split: tokens of each split but the last, which has the rest.
        query_stride_b: elements from one image's queries to the next; the strides that follow are alike.
        query_stride_q: from one query to the next.
        image_stride_b: from one image to the next.
        image_stride_n: from one token to the next.
        key_weight_stride: from one row to the next.
        value_weight_stride: from one row to the next.
        mask_stride_b: from one image's mask to the next.
        heads: H.
        queries: Q.
        width: C.
        output: (B, Q, H * D); or (B, H, S, Q, D) fp32, the splits' contexts, if there are ``statistics``.
        statistics: (B, H, S, 2, Q) fp32, see :func:`blipstream_kernels.tiles.store_partial`; None writes the answer
        itself.
        SCALE: factor of the scores before the softmax.
        HEAD_DIM: D, a power of two.
        BLOCK_Q: queries of a program.
        BLOCK_N: tokens of a block.
        BLOCK_C: columns of a chunk.
        EVEN_C: whether BLOCK_C divides C.
        PRECISION: how fp32 is multiplied: ``ieee``, ``tf32x3`` or ``tf32``.
    """
    batch_head, split = tl.program_id(0), tl.program_id(1)
    batch, head = batch_head // heads, batch_head % heads
    row = tl.program_id(2) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q = load_query(query + batch.to(tl.int64) * query_stride_b, head, row, queries, query_stride_q, HEAD_DIM)
    image += batch.to(tl.int64) * image_stride_b
    if key_mask is not None:
        key_mask += batch.to(tl.int64) * mask_stride_b

    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    context = tl.zeros((BLOCK_Q, HEAD_DIM), tl.float32)
    first = split * tokens_per_split
    for start in range(first, tl.minimum(first + tokens_per_split, tokens), BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        key = tl.zeros((BLOCK_N, HEAD_DIM), tl.float32)
        value = tl.zeros((BLOCK_N, HEAD_DIM), tl.float32)
        for chunk in range(0, width, BLOCK_C):
            column = chunk + tl.arange(0, BLOCK_C)
            x = load_tokens(image, token, column, tokens, width, image_stride_n, EVEN_C)
            w_k = load_weight(key_weight, head, column, width, key_weight_stride, HEAD_DIM, EVEN_C)
            w_v = load_weight(value_weight, head, column, width, value_weight_stride, HEAD_DIM, EVEN_C)
            key = dot(x, tl.trans(w_k), key, PRECISION)
            value = dot(x, tl.trans(w_v), value, PRECISION)
        scores = dot(q, tl.trans(key.to(q.dtype)), tl.zeros((BLOCK_Q, BLOCK_N), tl.float32), PRECISION)
        scores = mask_scores(scores * (SCALE * LOG2_E), key_mask, token, tokens)

        largest_now = tl.maximum(largest, tl.max(scores, 1))
        decay = tl.exp2(largest - largest_now)
        weights = tl.exp2(scores - largest_now[:, None])
        total = total * decay + tl.sum(weights, 1)
        context = dot(weights.to(q.dtype), value.to(q.dtype), context * decay[:, None], PRECISION)
        largest = largest_now

    store_result(
        output, statistics, value_bias, context, largest, total, batch_head, split, row, heads, queries, HEAD_DIM
    )
