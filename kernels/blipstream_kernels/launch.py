"""The fused cross-attention as a function of torch tensors: checks them, plans, launches."""

from __future__ import annotations

import math
from functools import cache
from typing import Literal, get_args

import torch
import triton
from torch import Tensor

from blipstream.errors import KernelInputError
from blipstream_kernels.absorbed import absorbed
from blipstream_kernels.merge import merge
from blipstream_kernels.plan import FORMS, HEAD_DIMS, DType, Form, Plan, Problem, choose
from blipstream_kernels.projected import projected
from blipstream_kernels.tiles import INTERPRETED

Precision = Literal["ieee", "tf32x3", "tf32"]

_KERNELS = {"projected": projected, "absorbed": absorbed}
_DTYPES: dict[torch.dtype, DType] = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_INTERPRETED_MULTIPROCESSORS = 108
"""The interpreter has none; it plans as for an A100."""
MERGE_BLOCK_Q = 8
"""Queries of a program of the merge, which moves memory and wants many programs."""
MERGE_WARPS = 4


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
    form: Form | None = None,
    *,
    splits: int | None = None,
    precision: Precision = "ieee",
) -> Tensor:
    """Cross-attention of the Q-Former: project keys and values of the image tokens, and let the queries attend to them.

    All tensors are of one dtype (fp32, fp16 or bf16) and on one CUDA device; their last dimension is contiguous, other
    strides are free. Sums are in fp32.

    The key bias b_k is not read: it adds ``q . b_k`` to all scores of a query, and a softmax does not see what it adds
    to all its inputs. The value bias is added to the result, since the probabilities sum to one.

    Args:
        query: (B, Q, H * D), projected; D is 16, 32, 64 or 128.
        image: (B, N, C).
        key_weight: (H * D, C).
        key_bias: (H * D,).
        value_weight: (H * D, C).
        value_bias: (H * D,).
        num_heads: H.
        scale: factor of the scores before the softmax; by default D ** -0.5.
        key_mask: (B, N) bool or integers, False or 0 where a key is masked. A row whose keys are all masked gets the
            mean of all values, as in Hugging Face transformers' eager attention.
        form: ``projected`` or ``absorbed``; by default what :func:`blipstream_kernels.plan.choose` finds faster.
        splits: at most so many splits of the tokens; by default chosen as well.
        precision: how fp32 is multiplied. ``ieee`` is faithful, ``tf32x3`` nearly so on tensor cores, ``tf32`` is not.

    Returns:
        (B, Q, H * D), contiguous, before the output projection.

    Raises:
        KernelInputError: a tensor or an option is not as above.
    """
    _check_options(form, splits, precision, scale)
    weights = {"key_weight": key_weight, "value_weight": value_weight}
    biases = {"key_bias": key_bias, "value_bias": value_bias}
    problem = _check_tensors(query, image, weights, biases, key_mask, num_heads)
    plan = choose(problem, multiprocessors(query.device), form, splits)
    scale = problem.head_dim**-0.5 if scale is None else scale
    return _run(query, image, key_weight, value_weight, value_bias, key_mask, problem, plan, scale, precision)


def _run(
    query: Tensor,
    image: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    key_mask: Tensor | None,
    problem: Problem,
    plan: Plan,
    scale: float,
    precision: Precision,
) -> Tensor:
    answer = query.new_empty(problem.batch, problem.queries, problem.heads * problem.head_dim)
    whole = plan.splits == 1
    output, statistics = (answer, None) if whole else _partial_results(query, problem, plan.splits)
    if key_mask is not None and key_mask.dtype == torch.bool:
        key_mask = key_mask.view(torch.uint8)
    config, block_queries = plan.config, problem.block_queries
    _KERNELS[plan.form][(problem.batch * problem.heads, plan.splits, triton.cdiv(problem.queries, block_queries))](
        query,
        image,
        key_weight,
        value_weight,
        value_bias if whole else None,
        key_mask,
        problem.tokens,
        plan.tokens_per_split,
        *query.stride()[:2],
        *image.stride()[:2],
        key_weight.stride(0),
        value_weight.stride(0),
        0 if key_mask is None else key_mask.stride(0),
        problem.heads,
        problem.queries,
        problem.width,
        output,
        statistics,
        SCALE=scale,
        HEAD_DIM=problem.head_dim,
        BLOCK_Q=block_queries,
        BLOCK_N=config.block_tokens,
        BLOCK_C=config.block_width,
        EVEN_C=problem.width % config.block_width == 0,
        PRECISION=precision,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    if statistics is not None:
        _merge(output, statistics, value_bias, answer, problem, plan.splits)
    return answer


def _merge(
    partial: Tensor, statistics: Tensor, value_bias: Tensor, answer: Tensor, problem: Problem, splits: int
) -> None:
    merge[(problem.batch * problem.heads, triton.cdiv(problem.queries, MERGE_BLOCK_Q))](
        partial,
        statistics,
        value_bias,
        splits,
        problem.heads,
        problem.queries,
        answer,
        HEAD_DIM=problem.head_dim,
        BLOCK_Q=MERGE_BLOCK_Q,
        num_warps=MERGE_WARPS,
        enable_fp_fusion=True,
    )


def _partial_results(query: Tensor, problem: Problem, splits: int) -> tuple[Tensor, Tensor]:
    """Where the splits write: contexts (B, H, S, Q, D) and statistics (B, H, S, 2, Q), fp32."""
    batch, heads, queries = problem.batch, problem.heads, problem.queries
    context = query.new_empty(batch, heads, splits, queries, problem.head_dim, dtype=torch.float32)
    return context, query.new_empty(batch, heads, splits, 2, queries, dtype=torch.float32)


def _check_options(form: str | None, splits: int | None, precision: str, scale: float | None) -> None:
    if form is not None and form not in FORMS:
        raise KernelInputError(f"form is {form!r}; expected one of {', '.join(FORMS)}, or None")
    if splits is not None and splits < 1:
        raise KernelInputError(f"splits is {splits}; expected at least 1, or None")
    if precision not in get_args(Precision):
        raise KernelInputError(f"precision is {precision!r}; expected one of {', '.join(get_args(Precision))}")
    if scale is not None and not math.isfinite(scale):
        raise KernelInputError(f"scale is {scale}; expected a finite number")


def _check_tensors(
    query: Tensor,
    image: Tensor,
    weights: dict[str, Tensor],
    biases: dict[str, Tensor],
    key_mask: Tensor | None,
    num_heads: int,
) -> Problem:
    """Refuse what the kernels cannot read; return the sizes of the rest."""
    problem = _sizes(query, image, num_heads)
    hidden = problem.heads * problem.head_dim
    for name, weight in weights.items():
        _check_shape(name, weight, (hidden, problem.width))
    for name, bias in biases.items():
        _check_shape(name, bias, (hidden,))
    for name, tensor in {"query": query, "image": image, **weights, **biases}.items():
        if tensor.dtype != query.dtype:
            raise KernelInputError(f"{name} is {tensor.dtype}; expected {query.dtype}, as query is")
        _check_layout(name, tensor, query)
    if key_mask is not None:
        _check_shape("key_mask", key_mask, (problem.batch, problem.tokens))
        if key_mask.dtype not in (torch.bool, torch.uint8, torch.int32, torch.int64):
            raise KernelInputError(f"key_mask is {key_mask.dtype}; expected bool, uint8, int32 or int64")
        _check_layout("key_mask", key_mask, query)
    return problem


def _sizes(query: Tensor, image: Tensor, num_heads: int) -> Problem:
    for name, tensor, axes in (("query", query, "(B, Q, H * D)"), ("image", image, "(B, N, C)")):
        if tensor.ndim != 3 or 0 in tensor.shape:
            raise KernelInputError(f"{name} has shape {tuple(tensor.shape)}; expected {axes}, none of them 0")
    if query.dtype not in _DTYPES:
        raise KernelInputError(f"query is {query.dtype}; expected one of {', '.join(map(str, _DTYPES))}")
    batch, queries, hidden = query.shape
    if image.shape[0] != batch:
        raise KernelInputError(f"image has a batch of {image.shape[0]}; expected {batch}, as query has")
    if num_heads < 1 or hidden % num_heads or hidden // num_heads not in HEAD_DIMS:
        sizes = ", ".join(map(str, HEAD_DIMS))
        raise KernelInputError(f"query has {hidden} columns for {num_heads} heads; expected heads of one of {sizes}")
    tokens, width = image.shape[1:]
    return Problem(batch, num_heads, queries, tokens, width, hidden // num_heads, _DTYPES[query.dtype])


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise KernelInputError(f"{name} has shape {tuple(tensor.shape)}; expected {expected}")


def _check_layout(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise KernelInputError(f"{name} is on {tensor.device}; expected {query.device}, where query is")
    if not tensor.is_cuda and not INTERPRETED.value:
        raise KernelInputError(f"{name} is on {tensor.device}; expected a CUDA device")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise KernelInputError(f"the last dimension of {name} has stride {tensor.stride(-1)}; expected 1")


def multiprocessors(device: torch.device) -> int:
    """What plans for a device are made with."""
    return _cuda_multiprocessors(device) if device.type == "cuda" else _INTERPRETED_MULTIPROCESSORS


@cache
def _cuda_multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
