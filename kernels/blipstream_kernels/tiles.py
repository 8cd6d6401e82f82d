"""What the kernels share: loading tiles, multiplying them, and the softmax over blocks of tokens.

A *tile* is what one program holds of a matrix. All sums are kept in fp32; tiles are multiplied in the dtype of the
inputs. Exponentials are powers of two, the GPU's own: scores are scaled by ``scale * log2(e)`` first.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

LOG2_E = tl.constexpr(1.4426950408889634)
MASKED = tl.constexpr(-1.0e38)
"""Score of a masked key, in place of minus infinity: finite, so that a row whose keys are all masked has a softmax."""
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
"""Whether these functions run in the interpreter (``TRITON_INTERPRET=1`` when this module was imported)."""


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """``total + a @ b`` in fp32; ``PRECISION`` says how fp32 tiles are multiplied."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        # The interpreter holds bf16 as bits, which NumPy would multiply as integers. Products of bf16 are exact in
        # fp32.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def load_query(query, head, row, queries, stride, HEAD_DIM: tl.constexpr):
    """One head's queries ``row`` (BLOCK_Q,), zeros behind the last: (BLOCK_Q, D)."""
    dim = tl.arange(0, HEAD_DIM)
    pointers = query + row[:, None] * stride + (head * HEAD_DIM + dim)[None, :]
    return tl.load(pointers, mask=(row < queries)[:, None], other=0.0)


@triton.jit
def load_tokens(image, token, column, tokens, width, stride, EVEN_C: tl.constexpr):
    """Columns ``column`` (BLOCK_C,) of tokens ``token`` (BLOCK_N,), zeros beyond the matrix: (BLOCK_N, BLOCK_C)."""
    inside = (token < tokens)[:, None]
    if not EVEN_C:
        inside = inside & (column < width)[None, :]
    return tl.load(image + token[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def load_weight(weight, head, column, width, stride, HEAD_DIM: tl.constexpr, EVEN_C: tl.constexpr):
    """Columns ``column`` (BLOCK_C,) of one head's rows of a projection, zeros beyond the matrix: (D, BLOCK_C)."""
    row = head * HEAD_DIM + tl.arange(0, HEAD_DIM)
    pointers = weight + row[:, None] * stride + column[None, :]
    if EVEN_C:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(column < width)[None, :], other=0.0)


@triton.jit
def mask_scores(scores, key_mask, token, tokens):
    """Scores (BLOCK_Q, BLOCK_N) with masked keys at ``MASKED``, and at minus infinity what is no key at all."""
    if key_mask is not None:
        kept = tl.load(key_mask + token, mask=token < tokens, other=0) != 0
        scores = tl.where(kept[None, :], scores, MASKED)
    return tl.where((token < tokens)[None, :], scores, float("-inf"))


@triton.jit
def load_bias(value_bias, head, HEAD_DIM: tl.constexpr):
    """One head's part of the value bias, in fp32: (1, D)."""
    return tl.load(value_bias + head * HEAD_DIM + tl.arange(0, HEAD_DIM)).to(tl.float32)[None, :]


@triton.jit
def store_output(output, context, batch, head, row, heads, queries, HEAD_DIM: tl.constexpr):
    """Write one head's context (BLOCK_Q, D) into the output (B, Q, H * D), in the output's dtype."""
    dim = tl.arange(0, HEAD_DIM)
    position = (batch.to(tl.int64) * queries + row[:, None]) * (heads * HEAD_DIM) + (head * HEAD_DIM + dim)[None, :]
    tl.store(output + position, context.to(output.dtype.element_ty), mask=(row < queries)[:, None])


@triton.jit
def store_partial(
    partial, statistics, context, largest, total, batch_head, split, row, queries, HEAD_DIM: tl.constexpr
):
    """Write what one split came to, for the merge.

    ``context`` (BLOCK_Q, D) is not normalised; ``largest`` and ``total`` (BLOCK_Q,) are the softmax's maximum, in
    powers of two, and its sum. They go to partial (B, H, S, Q, D) and statistics (B, H, S, 2, Q), both fp32.
    """
    place = batch_head.to(tl.int64) * tl.num_programs(1) + split
    dim = tl.arange(0, HEAD_DIM)
    inside = row < queries
    tl.store(partial + (place * queries + row[:, None]) * HEAD_DIM + dim[None, :], context, mask=inside[:, None])
    tl.store(statistics + place * 2 * queries + row, largest, mask=inside)
    tl.store(statistics + (place * 2 + 1) * queries + row, total, mask=inside)


@triton.jit
def store_result(
    output,
    statistics,
    value_bias,
    context,
    largest,
    total,
    batch_head,
    split,
    row,
    heads,
    queries,
    HEAD_DIM: tl.constexpr,
):
    """Write what a program came to: the answer itself, or a split's part of it where there are ``statistics``."""
    batch, head = batch_head // heads, batch_head % heads
    if statistics is None:
        context = context / total[:, None] + load_bias(value_bias, head, HEAD_DIM)
        store_output(output, context, batch, head, row, heads, queries, HEAD_DIM)
    else:
        store_partial(output, statistics, context, largest, total, batch_head, split, row, queries, HEAD_DIM)
