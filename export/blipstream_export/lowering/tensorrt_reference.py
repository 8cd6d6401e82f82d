"""What TensorRT's own operators mean, written in ONNX's: a graph for TensorRT in a form that any runtime can execute.

Source: docs/TRT_custom_ops.md of onnx-tensorrt, and the documentation of ``IAttention``. Scores, softmax and products
are float32 whatever the type of query, key and value, as the accumulators of a fused kernel are.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx_ir import tape

from blipstream.errors import EngineError
from blipstream_export.lowering.operators import put_in_place
from blipstream_export.lowering.plugin_reference import expand_plugin
from blipstream_export.lowering.plugins import PLUGIN_DOMAIN
from blipstream_export.lowering.tensorrt import ATTENTION, DOMAIN

_KNOWN = {"TRT_decomposable"}
"""Attributes that change nothing in the result; of the others, only their defaults are read."""


def standard_form(model: ir.Model) -> None:
    """Replace every node of TensorRT's domain, and every plugin of Blipstream's, by nodes of ONNX's own.

    Raises:
        EngineError: a node, or an input or attribute of one, whose meaning is not written here.
    """
    for node in list(model.graph):
        if node.domain == DOMAIN:
            _replace(model.graph, node)
        elif node.domain == PLUGIN_DOMAIN:
            steps = tape.Tape()
            results = expand_plugin(steps, node)
            put_in_place(model.graph, node, steps.nodes, results)
    for domain in (DOMAIN, PLUGIN_DOMAIN):
        model.opset_imports.pop(domain, None)


def write_standard_form(source: Path, target: Path) -> Path:
    """Write the standard form of the graph at ``source`` to ``target``; external weights are expected beside both."""
    model = ir.load(source)
    standard_form(model)
    ir.save(model, target)
    return target


def _replace(graph: ir.Graph, node: ir.Node) -> None:
    if node.op_type != ATTENTION:
        raise EngineError(f"the meaning of {node.domain}.{node.op_type} is not written down")
    unknown = [name for name in node.attributes if name not in _KNOWN]
    unknown += [f"input {index}" for index, value in enumerate(node.inputs[4:], 4) if value is not None]
    if unknown:
        raise EngineError(f"{node.name}: the meaning of {', '.join(unknown)} of {ATTENTION} is not written down")
    steps = tape.Tape()
    query, key, value, *rest = node.inputs
    assert query is not None
    assert key is not None
    assert value is not None
    attended = _attention(steps, query, key, value, rest[0] if rest else None)
    put_in_place(graph, node, steps.nodes, [attended])


def _attention(steps: tape.Tape, query: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value | None) -> ir.Value:
    """softmax(Q K^T + mask) V of (B, H, S, D), (B, H_kv, L, D) and a mask that broadcasts to (B, H, S, L)."""
    num_heads, num_kv_heads = (_size(x, 1) for x in (query, key))
    q, k, v = (steps.op("Cast", [x], {"to": ir.DataType.FLOAT}) for x in (query, key, value))
    if num_heads != num_kv_heads:
        k, v = (_repeat(steps, x, num_heads // num_kv_heads, num_heads, _size(key, 3)) for x in (k, v))
    scores = steps.op("MatMul", [q, steps.op("Transpose", [k], {"perm": [0, 1, 3, 2]})])
    if mask is not None and mask.dtype == ir.DataType.BOOL:
        lowest = steps.op("Constant", [], {"value_float": float("-inf")})
        scores = steps.op("Where", [mask, scores, lowest])
    elif mask is not None:
        scores = steps.op("Add", [scores, steps.op("Cast", [mask], {"to": ir.DataType.FLOAT})])
    attended = steps.op("MatMul", [steps.op("Softmax", [scores], {"axis": -1}), v])
    assert query.dtype is not None
    return steps.op("Cast", [attended], {"to": query.dtype})


def _repeat(steps: tape.Tape, x: ir.Value, times: int, num_heads: int, head_dim: int) -> ir.Value:
    """(B, H / times, L, D) -> (B, H, L, D), each head ``times`` times in a row."""
    axis = steps.op("Constant", [], {"value_ints": [2]})
    tiles = steps.op("Constant", [], {"value_ints": [1, 1, times, 1, 1]})
    shape = steps.op("Constant", [], {"value_ints": [0, num_heads, -1, head_dim]})
    return steps.op("Reshape", [steps.op("Tile", [steps.op("Unsqueeze", [x, axis]), tiles]), shape])


def _size(value: ir.Value, axis: int) -> int:
    size = None if value.shape is None else value.shape[axis]
    if not isinstance(size, int):
        raise EngineError(f"{value.name}: size {axis} of its shape {value.shape} must be known")
    return size
