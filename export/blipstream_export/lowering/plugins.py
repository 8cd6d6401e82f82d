"""Blipstream's own kernels in a graph for TensorRT: the Q-Former's cross-attention as nodes of its plugins.

A plugin is an ONNX node whose operator is the plugin's name; its attributes are the plugin's, and ``plugin_namespace``,
``plugin_version`` and ``aot`` say which (source: the importer's ``importPluginCreator`` and ``createPlugin`` in
onnx-tensorrt). The plugins are in :mod:`blipstream_kernels.plugin`; what they mean is written in ONNX's operators in
:mod:`blipstream_export.lowering.plugin_reference`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common
from blipstream_kernels.plan import HEAD_DIMS, DType, Problem, choose

from blipstream_export.lowering.tensorrt import ATTENTION, DOMAIN

PLUGIN_DOMAIN = "blipstream"
WHOLE, SPLIT, MERGE = "cross_attention", "cross_attention_split", "cross_attention_merge"

_DTYPES: dict[ir.DataType | None, DType] = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
}


@dataclass(frozen=True)
class Gpu:
    """For which GPU kernels are compiled and planned.

    Attributes:
        architecture: compute capability, as 90 for 9.0.
        multiprocessors: how many it has.
    """

    architecture: int
    multiprocessors: int


@dataclass(frozen=True)
class _CrossAttention:
    """A cross-attention as it stands in the graph of the Q-Former.

    Attributes:
        query: (B * Q, H * D), projected.
        image: (B * N, C).
        weight: (2 * H * D, C), of keys and values.
        bias: (2 * H * D,).
        output: (B * Q, H * D), before the output projection.
        scale: of the scores.
        problem: the sizes, for one image.
    """

    query: ir.Value
    image: ir.Value
    weight: ir.Value
    bias: ir.Value
    output: ir.Value
    scale: float
    problem: Problem


def use_plugins(graph: Path, gpu: Gpu) -> int:
    """Replace the cross-attentions of the Q-Former's graph by plugins, in its file; return how many there were.

    A cross-attention whose heads are none that the kernels know (16, 32, 64 or 128 wide) is left as it is.
    """
    model = ir.load(graph)
    found = list(_find(model.graph))
    if not found:
        return 0
    model = ir.external_data.load_to_model(model)
    for one in found:
        _replace(model.graph, one, gpu)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    model.opset_imports[PLUGIN_DOMAIN] = 1
    weights = graph.with_name(f"{graph.name}.data")
    weights.unlink(missing_ok=True)
    ir.save(model, graph, external_data=weights.name)
    return len(found)


def has_plugins(model: ir.Model) -> bool:
    """Whether nodes of the graph are plugins."""
    return any(node.domain == PLUGIN_DOMAIN for node in model.graph)


def _find(graph: ir.Graph) -> Iterator[_CrossAttention]:
    for node in graph:
        if (node.domain, node.op_type) == (DOMAIN, ATTENTION) and len(node.inputs) == 3:
            found = _match(node)
            if found is not None and found.problem.head_dim in HEAD_DIMS:
                yield found


def _match(attention: ir.Node) -> _CrossAttention | None:
    """The cross-attention around an attention, if its keys and values come from one projection of the image alone."""
    query, key, value = attention.inputs
    split = _behind(_behind(_source(key, "Transpose"), "Reshape"), "Split")
    if (
        split is None
        or len(split.outputs) != 2
        or _behind(_behind(_source(value, "Transpose"), "Reshape"), "Split") != split
    ):
        return None
    gemm = _behind(_behind(split, "Reshape"), "Gemm")
    scaling = _source(query, "Mul")
    scale = 1.0 if scaling is None else _constant(scaling.inputs[1])
    heads = _source(query if scaling is None else scaling.inputs[0], "Transpose")
    flat = _behind(heads, "Reshape")
    output = _only_user(_only_user(attention, "Transpose"), "Reshape")
    if gemm is None or flat is None or output is None or scale is None or len(gemm.inputs) != 3:
        return None
    image, weight, bias = gemm.inputs
    assert query is not None
    assert key is not None
    assert image is not None
    assert image.shape is not None
    assert query.shape is not None
    assert key.shape is not None
    sizes = [query.shape[1], query.shape[2], key.shape[2], image.shape[1], query.shape[3]]
    if not all(isinstance(size, int) for size in sizes) or query.dtype not in _DTYPES:
        return None
    if _tensor(weight) is None or _tensor(bias) is None:
        return None
    num_heads, queries, tokens, width, head_dim = (int(size) for size in sizes)  # type: ignore[arg-type]
    problem = Problem(1, num_heads, queries, tokens, width, head_dim, _DTYPES[query.dtype])
    flat_query = flat.inputs[0]
    assert flat_query is not None
    assert weight is not None
    assert bias is not None
    return _CrossAttention(flat_query, image, weight, bias, output.outputs[0], scale, problem)


def _source(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def _behind(node: ir.Node | None, op_type: str) -> ir.Node | None:
    """The node that makes a node's first input, if it is such an operator."""
    return None if node is None else _source(node.inputs[0], op_type)


def _only_user(node: ir.Node | None, op_type: str) -> ir.Node | None:
    if node is None:
        return None
    users = [use.node for use in node.outputs[0].uses()]
    return users[0] if len(users) == 1 and users[0].op_type == op_type else None


def _constant(value: ir.Value | None) -> float | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.size != 1 else float(np.asarray(tensor.numpy(), np.float32).reshape(()))


def _replace(graph: ir.Graph, found: _CrossAttention, gpu: Gpu) -> None:
    problem = found.problem
    hidden = problem.heads * problem.head_dim
    weight, bias = (_numpy(value) for value in (found.weight, found.bias))
    names = (f"{found.weight.name}.key", f"{found.weight.name}.value", f"{found.bias.name}.value")
    key_weight, value_weight, value_bias = (
        _initializer(graph, name, array)
        for name, array in zip(names, (weight[:hidden], weight[hidden:], bias[hidden:]), strict=True)
    )
    splits = choose(problem, gpu.multiprocessors).splits
    sizes = {"heads": problem.heads, "queries": problem.queries, "architecture": gpu.architecture}
    reading = {"tokens": problem.tokens, "scale": found.scale}
    inputs = [found.query, found.image, key_weight, value_weight]
    maker = found.output.producer()
    assert maker is not None
    if splits == 1:
        last = _plugin(WHOLE, [*inputs, value_bias], {**sizes, **reading})
        nodes = [last]
    else:
        first = _plugin(SPLIT, inputs, {**sizes, **reading, "splits": splits}, num_outputs=2)
        last = _plugin(MERGE, [*first.outputs, value_bias], {**sizes, "splits": splits})
        batch = found.image.shape[0] if found.image.shape is not None else None
        partial = [batch if isinstance(batch, int) else None, problem.heads, splits, problem.queries, problem.head_dim]
        for output, shape in zip(first.outputs, (partial, [*partial[:3], 2, problem.queries]), strict=True):
            output.shape, output.dtype = ir.Shape(shape), ir.DataType.FLOAT
        nodes = [first, last]
    graph.insert_before(maker, nodes)
    made = last.outputs[0]
    made.shape, made.type = found.output.shape, found.output.type
    ir.convenience.replace_all_uses_with(found.output, made, replace_graph_outputs=True)


def _plugin(name: str, inputs: list[ir.Value], attributes: dict[str, int | float], num_outputs: int = 1) -> ir.Node:
    chosen: dict[str, int | float | str] = {"plugin_namespace": PLUGIN_DOMAIN, "plugin_version": "1", "aot": 1}
    return ir.node(name, inputs, {**attributes, **chosen}, domain=PLUGIN_DOMAIN, num_outputs=num_outputs)


def _tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """A weight, as it is stored: perhaps in half precision, from which a graph in fp32 casts it."""
    cast = _source(value, "Cast")
    value = cast.inputs[0] if cast is not None else value
    return None if value is None else ir.convenience.get_const_tensor(value)


def _numpy(value: ir.Value) -> np.ndarray:  # type: ignore[type-arg]
    """A weight in the type that the graph computes in."""
    tensor = _tensor(value)
    assert tensor is not None
    assert value.dtype is not None
    return tensor.numpy().astype(value.dtype.numpy())


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:  # type: ignore[type-arg]
    if name in graph.initializers:
        return graph.initializers[name]
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), const_value=ir.tensor(np.ascontiguousarray(array), name=name)
    )
    assert value.const_value is not None
    value.dtype = value.const_value.dtype
    graph.initializers[name] = value
    return value
