"""What Blipstream's plugins mean, written in ONNX's operators (see :mod:`blipstream_kernels.reference` for torch's).

Partial results of splits have one meaning only, that of being merged: here the tokens are split evenly, where a kernel
splits them at its blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import onnx_ir as ir
from onnx_ir import tape

from blipstream.errors import EngineError
from blipstream_export.lowering.plugins import MERGE, SPLIT, WHOLE

_FLOAT = {"to": ir.DataType.FLOAT}


def expand_plugin(steps: tape.Tape, node: ir.Node) -> Sequence[ir.Value]:
    """Write a plugin in ONNX's operators; return what stands for its outputs.

    Raises:
        EngineError: it is none of Blipstream's.
    """
    if node.op_type not in _MEANINGS:
        raise EngineError(f"the meaning of the plugin {node.op_type} is not written down")
    inputs = [value for value in node.inputs if value is not None]
    return _MEANINGS[node.op_type](steps, node, inputs)


def _whole(steps: tape.Tape, node: ir.Node, inputs: Sequence[ir.Value]) -> Sequence[ir.Value]:
    query, image, key_weight, value_weight, value_bias = inputs
    scores, values = _scores(steps, node, query, image, key_weight, value_weight)
    weights = steps.op("Softmax", [scores], {"axis": -1})
    return [_flat(steps, steps.op("MatMul", [weights, values]), value_bias)]


def _split(steps: tape.Tape, node: ir.Node, inputs: Sequence[ir.Value]) -> Sequence[ir.Value]:
    scores, values = _scores(steps, node, *inputs)
    scores = steps.op("Mul", [scores, _number(steps, math.log2(math.e))])
    splits, tokens = _int(node, "splits"), _int(node, "tokens")
    bounds = [tokens * index // splits for index in range(splits + 1)]
    contexts, statistics = [], []
    for first, last in itertools.pairwise(bounds):
        here = _slice(steps, scores, first, last, 3)
        largest = steps.op("ReduceMax", [here, _ints(steps, -1)], {"keepdims": 1})
        weights = steps.op("Pow", [_number(steps, 2.0), steps.op("Sub", [here, largest])])
        total = steps.op("ReduceSum", [weights, _ints(steps, -1)], {"keepdims": 1})
        context = steps.op("MatMul", [weights, _slice(steps, values, first, last, 2)])
        contexts.append(steps.op("Unsqueeze", [context, _ints(steps, 2)]))  # (B, H, 1, Q, D)
        pair = steps.op("Transpose", [steps.op("Concat", [largest, total], {"axis": 3})], {"perm": [0, 1, 3, 2]})
        statistics.append(steps.op("Unsqueeze", [pair, _ints(steps, 2)]))  # (B, H, 1, 2, Q)
    return [steps.op("Concat", parts, {"axis": 2}) for parts in (contexts, statistics)]


def _merge(steps: tape.Tape, node: ir.Node, inputs: Sequence[ir.Value]) -> Sequence[ir.Value]:
    del node
    partial, statistics, value_bias = inputs
    largest, total = (_slice(steps, statistics, index, index + 1, 3) for index in range(2))  # (B, H, S, 1, Q)
    peak = steps.op("ReduceMax", [largest, _ints(steps, 2)], {"keepdims": 1})
    share = steps.op("Pow", [_number(steps, 2.0), steps.op("Sub", [largest, peak])])
    sums = steps.op("ReduceSum", [steps.op("Mul", [share, total]), _ints(steps, 2)], {"keepdims": 0})  # (B, H, 1, Q)
    turned = steps.op("Transpose", [share], {"perm": [0, 1, 2, 4, 3]})  # (B, H, S, Q, 1)
    context = steps.op("ReduceSum", [steps.op("Mul", [turned, partial]), _ints(steps, 2)], {"keepdims": 0})
    context = steps.op("Div", [context, steps.op("Transpose", [sums], {"perm": [0, 1, 3, 2]})])  # (B, H, Q, D)
    return [_flat(steps, context, value_bias)]


_Meaning = Callable[[tape.Tape, ir.Node, Sequence[ir.Value]], Sequence[ir.Value]]
_MEANINGS: dict[str, _Meaning] = {WHOLE: _whole, SPLIT: _split, MERGE: _merge}


def _scores(
    steps: tape.Tape, node: ir.Node, query: ir.Value, image: ir.Value, key_weight: ir.Value, value_weight: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Scaled scores (B, H, Q, N) and values (B, H, N, D), fp32."""
    heads, queries, tokens = (_int(node, name) for name in ("heads", "queries", "tokens"))
    q, x, w_k, w_v = (steps.op("Cast", [value], _FLOAT) for value in (query, image, key_weight, value_weight))
    assert key_weight.shape is not None
    split = (heads, int(key_weight.shape[0]) // heads)  # type: ignore[arg-type]
    keys, values = (
        _heads(steps, steps.op("MatMul", [x, steps.op("Transpose", [w], {"perm": [1, 0]})]), tokens, *split)
        for w in (w_k, w_v)
    )
    turned = steps.op("Transpose", [keys], {"perm": [0, 1, 3, 2]})
    products = steps.op("MatMul", [_heads(steps, q, queries, *split), turned])
    scale = node.attributes.get_float("scale")
    assert scale is not None
    return steps.op("Mul", [products, _number(steps, scale)]), values


def _heads(steps: tape.Tape, flat: ir.Value, rows: int, heads: int, head_dim: int) -> ir.Value:
    """(B * rows, H * D) -> (B, H, rows, D)"""
    shape = _ints(steps, -1, rows, heads, head_dim)
    return steps.op("Transpose", [steps.op("Reshape", [flat, shape])], {"perm": [0, 2, 1, 3]})


def _flat(steps: tape.Tape, context: ir.Value, value_bias: ir.Value) -> ir.Value:
    """(B, H, Q, D) fp32 -> (B * Q, H * D), with the value bias and in its type"""
    assert value_bias.shape is not None
    assert value_bias.dtype is not None
    shape = _ints(steps, -1, int(value_bias.shape[0]))  # type: ignore[arg-type]
    rows = steps.op("Reshape", [steps.op("Transpose", [context], {"perm": [0, 2, 1, 3]}), shape])
    sums = steps.op("Add", [rows, steps.op("Cast", [value_bias], _FLOAT)])
    return steps.op("Cast", [sums], {"to": value_bias.dtype})


def _slice(steps: tape.Tape, value: ir.Value, first: int, last: int, axis: int) -> ir.Value:
    return steps.op("Slice", [value, _ints(steps, first), _ints(steps, last), _ints(steps, axis)])


def _ints(steps: tape.Tape, *values: int) -> ir.Value:
    return steps.op("Constant", [], {"value_ints": list(values)})


def _number(steps: tape.Tape, value: float) -> ir.Value:
    return steps.op("Constant", [], {"value_float": value})


def _int(node: ir.Node, name: str) -> int:
    value = node.attributes.get_int(name)
    assert value is not None
    return value
