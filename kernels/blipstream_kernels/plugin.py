"""The fused cross-attention as ahead-of-time plugins of TensorRT: the engine carries the kernels' code.

Importing this module registers three plugins in the namespace ``blipstream``. ``cross_attention`` is whole, for where a
single image fills the GPU; ``cross_attention_split`` and ``cross_attention_merge`` are its two steps where the tokens
are split. Both forms of the kernel are tactics of the first two, of which TensorRT measures which is faster for the
shapes of a profile.

Tensors are flat, as in the Q-Former's graph: query (B * Q, H * D), image (B * N, C), weights (H * D, C), bias (H * D,).
The kernels have all sizes but B built in; TensorRT launches them with the tensors alone.

TensorRT reads the annotations as objects, so they may not be postponed: no ``from __future__ import annotations``.
"""

import numpy.typing  # noqa: F401, ICN001  # tensorrt.plugin reads it and does not import it
import tensorrt as trt
import tensorrt.plugin as trtp

from blipstream_kernels.aot import Compiled, compile_attention, compile_merge
from blipstream_kernels.launch import MERGE_BLOCK_Q
from blipstream_kernels.plan import FORMS, DType, Plan, Problem, config_of

NAMESPACE = "blipstream"

_TACTICS = dict(enumerate(FORMS, start=1))
"""Each form of the kernel, by its tactic."""

_DTYPES: dict[trt.DataType, DType] = {
    trt.DataType.FLOAT: "fp32",
    trt.DataType.HALF: "fp16",
    trt.DataType.BF16: "bf16",
}

_ANY = "FP32|FP16|BF16"
"""One of three types, the same for all tensors that are said to have it."""


# --- whole -----------------------------------------------------------------------------------------------------------


@trtp.register("blipstream::cross_attention")
def whole_output(
    query: trtp.TensorDesc,
    image: trtp.TensorDesc,
    key_weight: trtp.TensorDesc,
    value_weight: trtp.TensorDesc,
    value_bias: trtp.TensorDesc,
    heads: int,
    queries: int,
    tokens: int,
    architecture: int,
    scale: float,
) -> trtp.TensorDesc:
    """The output (B * Q, H * D)."""
    return query.like()


@trtp.autotune("blipstream::cross_attention")
def whole_combinations(
    query: trtp.TensorDesc,
    image: trtp.TensorDesc,
    key_weight: trtp.TensorDesc,
    value_weight: trtp.TensorDesc,
    value_bias: trtp.TensorDesc,
    outputs: tuple[trtp.TensorDesc],
) -> list[trtp.AutoTuneCombination]:
    """All of one type."""
    return [trtp.AutoTuneCombination(",".join([_ANY] * 6), "LINEAR", list(_TACTICS))]


@trtp.aot_impl("blipstream::cross_attention")
def whole_kernel(
    query: trtp.TensorDesc,
    image: trtp.TensorDesc,
    key_weight: trtp.TensorDesc,
    value_weight: trtp.TensorDesc,
    value_bias: trtp.TensorDesc,
    heads: int,
    queries: int,
    tokens: int,
    architecture: int,
    scale: float,
    outputs: tuple[trtp.TensorDesc],
    tactic: int,
) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymExprs]:
    """The kernel that needs no merge."""
    problem = _problem(query, image, heads, queries, tokens)
    plan = _plan(problem, tactic, 1)
    compiled = compile_attention(problem, plan, architecture, scale)
    return _launched(compiled, query, problem, 1, problem.block_queries)


# --- in splits -------------------------------------------------------------------------------------------------------


@trtp.register("blipstream::cross_attention_split")
def split_outputs(
    query: trtp.TensorDesc,
    image: trtp.TensorDesc,
    key_weight: trtp.TensorDesc,
    value_weight: trtp.TensorDesc,
    heads: int,
    queries: int,
    tokens: int,
    splits: int,
    architecture: int,
    scale: float,
) -> tuple[trtp.TensorDesc, trtp.TensorDesc]:
    """Partial contexts (B, H, S, Q, D) and their statistics (B, H, S, 2, Q), fp32."""
    batch = query.shape_expr[0] // queries
    head_dim = query.shape_expr[1] // heads
    context = trtp.from_shape_expr((batch, heads, splits, queries, head_dim), trt.DataType.FLOAT)
    return context, trtp.from_shape_expr((batch, heads, splits, 2, queries), trt.DataType.FLOAT)


@trtp.autotune("blipstream::cross_attention_split")
def split_combinations(
    query: trtp.TensorDesc,
    image: trtp.TensorDesc,
    key_weight: trtp.TensorDesc,
    value_weight: trtp.TensorDesc,
    outputs: tuple[trtp.TensorDesc, trtp.TensorDesc],
) -> list[trtp.AutoTuneCombination]:
    """Inputs of one type, partial results in fp32."""
    types = ",".join([_ANY] * 4 + ["FP32"] * 2)
    return [trtp.AutoTuneCombination(types, "LINEAR", list(_TACTICS))]


@trtp.aot_impl("blipstream::cross_attention_split")
def split_kernel(
    query: trtp.TensorDesc,
    image: trtp.TensorDesc,
    key_weight: trtp.TensorDesc,
    value_weight: trtp.TensorDesc,
    heads: int,
    queries: int,
    tokens: int,
    splits: int,
    architecture: int,
    scale: float,
    outputs: tuple[trtp.TensorDesc, trtp.TensorDesc],
    tactic: int,
) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymExprs]:
    """The kernel of one split."""
    problem = _problem(query, image, heads, queries, tokens)
    compiled = compile_attention(problem, _plan(problem, tactic, splits), architecture, scale)
    return _launched(compiled, query, problem, splits, problem.block_queries)


@trtp.register("blipstream::cross_attention_merge")
def merged_output(
    partial: trtp.TensorDesc,
    statistics: trtp.TensorDesc,
    value_bias: trtp.TensorDesc,
    heads: int,
    queries: int,
    splits: int,
    architecture: int,
) -> trtp.TensorDesc:
    """The output (B * Q, H * D)."""
    rows = partial.shape_expr[0] * queries
    return trtp.from_shape_expr((rows, value_bias.shape_expr[0]), value_bias.dtype)


@trtp.autotune("blipstream::cross_attention_merge")
def merge_combinations(
    partial: trtp.TensorDesc,
    statistics: trtp.TensorDesc,
    value_bias: trtp.TensorDesc,
    outputs: tuple[trtp.TensorDesc],
) -> list[trtp.AutoTuneCombination]:
    """Partial results in fp32, the bias and the output of one type."""
    return [trtp.AutoTuneCombination(",".join(["FP32"] * 2 + [_ANY] * 2), "LINEAR", [1])]


@trtp.aot_impl("blipstream::cross_attention_merge")
def merge_kernel(
    partial: trtp.TensorDesc,
    statistics: trtp.TensorDesc,
    value_bias: trtp.TensorDesc,
    heads: int,
    queries: int,
    splits: int,
    architecture: int,
    outputs: tuple[trtp.TensorDesc],
    tactic: int,
) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymExprs]:
    """The kernel that joins the splits."""
    hidden = value_bias.shape_expr[0].constant_value()
    problem = Problem(1, heads, queries, 1, 1, hidden // heads, _DTYPES[value_bias.dtype])
    launch = trtp.KernelLaunchParams()
    launch.grid_x, launch.grid_y = partial.shape_expr[0] * heads, _ceil_div(queries, MERGE_BLOCK_Q)
    return _with_code(compile_merge(problem, splits, architecture), launch)


# --- what they share -------------------------------------------------------------------------------------------------


def _problem(query: trtp.TensorDesc, image: trtp.TensorDesc, heads: int, queries: int, tokens: int) -> Problem:
    hidden, width = (tensor.shape_expr[1].constant_value() for tensor in (query, image))
    return Problem(1, heads, queries, tokens, width, hidden // heads, _DTYPES[query.dtype])


def _plan(problem: Problem, tactic: int, splits: int) -> Plan:
    """The plan of a form with exactly so many splits; some may be empty where its blocks are long."""
    form = _TACTICS.get(tactic, FORMS[0])
    config = config_of(form, problem.dtype)
    blocks = _ceil_div(problem.tokens, config.block_tokens)
    return Plan(form, config, splits, _ceil_div(blocks, splits) * config.block_tokens)


def _launched(
    compiled: Compiled, query: trtp.TensorDesc, problem: Problem, splits: int, block_queries: int
) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymExprs]:
    launch = trtp.KernelLaunchParams()
    launch.grid_x = (query.shape_expr[0] // problem.queries) * problem.heads
    launch.grid_y = splits
    launch.grid_z = _ceil_div(problem.queries, block_queries)
    return _with_code(compiled, launch)


def _with_code(
    compiled: Compiled, launch: trtp.KernelLaunchParams
) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymExprs]:
    launch.block_x, launch.shared_mem = compiled.threads, compiled.shared_bytes
    return compiled.name, compiled.ptx, launch, trtp.SymIntExprs(0)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
