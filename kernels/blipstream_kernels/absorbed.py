"""Cross-attention with the projections absorbed into the queries and the context: the *absorbed* form.

``q (X W_k^T)^T`` equals ``(q W_k) X^T``, and ``P (X W_v^T)`` equals ``(P X) W_v^T``, so neither keys nor values are
computed at all (the same regrouping as in DeepSeek-V2's multi-head latent attention, 2024, section 2.1). For each block
of n tokens X (n, C) a program sums the scores over chunks of C, takes the block's softmax P (Q, n), and adds ``((P X[:,
chunk]) W_v[:, chunk]^T)`` chunk by chunk: the value projection is linear, so it may be applied to each block and each
chunk, and no accumulator is wider than D. X is read twice, the second time from the cache.

Multiply-adds a block: ``2 Q C (n + D)``, against ``2 n C D + 2 Q n D`` of the projected form. With Q = 32 and D = 64
the absorbed form needs less of them once n > D Q / (D - Q) = 64; at n = 128 three quarters, and in the limit of long
blocks a half.

Why ``q W_k`` is not computed once per head, outside: it is (Q, C), 88 KiB in fp16 for the published shapes, which
neither registers nor an indexable part of the shared memory hold, so it would go through memory, by a kernel of its
own: 1.1 MB an image written and read by every split, and another launch. It would save ``Q C D`` of ``2 Q C (n + D)``,
a sixth at n = 128, and nothing is recomputed here as long as each split is one block, which is how plans with few
images are made. The context would still need ``W_v`` per block, since its (Q, C) sum in fp32 is 176 KiB. Without any
fused kernel the regrouping is four batched matrix multiplications; the benchmark measures that as well.
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
def absorbed(
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
    """Attend to one split of the tokens; grid and arguments are those of ``projected``."""
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
        scores = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
        for chunk in range(0, width, BLOCK_C):
            column = chunk + tl.arange(0, BLOCK_C)
            w_k = load_weight(key_weight, head, column, width, key_weight_stride, HEAD_DIM, EVEN_C)
            x = load_tokens(image, token, column, tokens, width, image_stride_n, EVEN_C)
            reading = dot(q, w_k, tl.zeros((BLOCK_Q, BLOCK_C), tl.float32), PRECISION)  # what the queries look for in X
            scores = dot(reading.to(q.dtype), tl.trans(x), scores, PRECISION)
        scores = mask_scores(scores * (SCALE * LOG2_E), key_mask, token, tokens)

        # Divided by the block's own sum before it is rounded: P X then stays in the range of X, in fp16 too.
        largest_here = tl.max(scores, 1)
        weights = tl.exp2(scores - largest_here[:, None])
        total_here = tl.sum(weights, 1)
        weights = (weights / total_here[:, None]).to(q.dtype)
        context_here = tl.zeros((BLOCK_Q, HEAD_DIM), tl.float32)
        for chunk in range(0, width, BLOCK_C):
            column = chunk + tl.arange(0, BLOCK_C)
            x = load_tokens(image, token, column, tokens, width, image_stride_n, EVEN_C)
            w_v = load_weight(value_weight, head, column, width, value_weight_stride, HEAD_DIM, EVEN_C)
            mean = dot(weights, x, tl.zeros((BLOCK_Q, BLOCK_C), tl.float32), PRECISION)
            context_here = dot(mean.to(q.dtype), tl.trans(w_v), context_here, PRECISION)

        largest_now = tl.maximum(largest, largest_here)
        decay = tl.exp2(largest - largest_now)
        share = total_here * tl.exp2(largest_here - largest_now)
        total = total * decay + share
        context = context * decay[:, None] + context_here * share[:, None]
        largest = largest_now

    store_result(
        output, statistics, value_bias, context, largest, total, batch_head, split, row, heads, queries, HEAD_DIM
    )
