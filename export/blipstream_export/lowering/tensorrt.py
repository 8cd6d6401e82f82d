"""The lowering for TensorRT: its own attention operator, and ONNX's operator for a cache that is updated in place.

``TRT_Attention`` is TensorRT's ``IAttention`` as an ONNX node (source: docs/TRT_custom_ops.md of onnx-tensorrt): it
neither reshapes nor scales, takes a mask that is boolean or added, and lets several query heads share one of keys. All
that is said about which token sees which is said by masks, whose meaning is beyond doubt, and not by the operator's
implicit kinds of causality. ``TensorScatter`` writes new keys and values into a cache whose input and output have one
address; TensorRT wants the cache to be an input and an output of the graph, of a length that is known at build time.
"""

from __future__ import annotations

import itertools
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common
import onnxscript
import torch

from blipstream_export import ops  # noqa: F401  (registers the operators)
from blipstream_export.lowering.operators import LoweringTable, Schema, declare, put_in_place

DOMAIN = "trt"
ATTENTION = "TRT_Attention"
OPSET = 24
"""The opset of TensorScatter. What else the graphs use is the same in it and in the opset of the export."""

_IR_VERSION = 12
"""Of the first release of ONNX that has this opset, 1.19."""

_HIDDEN = -65504.0
"""Added to the score of a key that nothing may see: the lowest fp16, whose exponential is 0 beside any other score."""

_INT64 = onnx.TensorProto.INT64
_op: Any = onnxscript.opset21


def tensorrt_lowering() -> LoweringTable:
    """TRT_Attention, TensorScatter, and what the importer of TensorRT 11 reads of ONNX itself.

    Caches have a length that is known when the graph is made. Clip, which TensorRT has for floating point alone, is
    not used on integers.
    """
    return {
        torch.ops.blipstream.attention.default: _attention,
        torch.ops.blipstream.cached_attention.default: _cached_attention,
        torch.ops.blipstream.cross_attention.default: _cross_attention,
        torch.ops.blipstream.distance_bias.default: _distance_bias,
        torch.ops.blipstream.rms_norm.default: _rms_norm,
    }


def finish_tensorrt(model: ir.Model) -> None:
    """Declare the opset of TensorScatter, rewrite what TensorRT does not read, compute what is the same in every layer
    once, and leave out of the graph outputs that are inputs, and inputs that nothing reads."""
    model.opset_imports[""] = OPSET
    model.ir_version = max(model.ir_version, _IR_VERSION)
    graph = model.graph
    lengths: dict[tuple[str, ...], ir.Value] = {}
    for node in list(graph):
        if node.op_type == "TensorScatter":
            node.domain, node.version = "", OPSET
        elif node.op_type == "Clip":
            _clip_integers(graph, node)
        elif node.op_type == "Squeeze" and len(node.inputs) == 1:
            _name_axes(graph, node)
        elif node.op_type == "Shape":
            _share_shape(graph, node, lengths)
    ir.passes.common.CommonSubexpressionEliminationPass()(model)
    for output in list(graph.outputs):
        producer = output.producer()
        if producer is not None and producer.op_type == "Identity" and producer.inputs[0] in graph.inputs:
            graph.outputs.remove(output)
            graph.remove(producer, safe=True)
    for value in list(graph.inputs):
        if not value.uses():
            graph.inputs.remove(value)
    ir.passes.common.ShapeInferencePass(check_type=True, strict_mode=True)(model)


def _clip_integers(graph: ir.Graph, node: ir.Node) -> None:
    """Max and Min in place of a Clip, unless it is one of floating point."""
    value, output = node.inputs[0], node.outputs[0]
    assert value is not None
    if value.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        return
    bounds = [(op, bound) for op, bound in zip(("Max", "Min"), node.inputs[1:], strict=False) if bound is not None]
    for op, bound in bounds:
        made = ir.node(op, [value, bound])
        made.outputs[0].shape, made.outputs[0].type = output.shape, output.type
        graph.insert_before(node, made)
        value = made.outputs[0]
    ir.convenience.replace_all_uses_with(output, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _name_axes(graph: ir.Graph, node: ir.Node) -> None:
    """Say which axes a Squeeze takes away; the importer reads none without (up to TensorRT 11.4)."""
    value = node.inputs[0]
    assert value is not None
    assert value.shape is not None
    axes = [axis for axis, size in enumerate(value.shape) if size == 1]
    constant = ir.node("Constant", [], {"value_ints": axes})
    constant.outputs[0].shape, constant.outputs[0].dtype = ir.Shape([len(axes)]), ir.DataType.INT64
    squeezed = ir.node("Squeeze", [value, constant.outputs[0]])
    put_in_place(graph, node, [constant, squeezed], squeezed.outputs)


def _share_shape(graph: ir.Graph, node: ir.Node, known: dict[tuple[str, ...], ir.Value]) -> None:
    """Take the sizes of free dimensions from one tensor, in whatever layer they are asked for."""
    value, output = node.inputs[0], node.outputs[0]
    assert value is not None
    if value.shape is None:
        return
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(value.shape))
    dims = tuple(str(dim) for dim in value.shape[start:end])
    if "None" in dims:
        return
    first = known.setdefault(dims, output)
    if first is not output:
        ir.convenience.replace_all_uses_with(output, first)
        graph.remove(node, safe=True)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    num_heads: int,
    scale: float,
    key_padding_mask: Any = None,
    bias: Any = None,
) -> Any:
    q, k, v = (_split_heads(x, num_heads) for x in (query, key, value))
    mask = bias
    if key_padding_mask is not None:
        mask = _op.Unsqueeze(_op.Cast(key_padding_mask, to=onnx.TensorProto.BOOL), [1, 2])  # (B, 1, 1, L)
        mask = _masked(bias, mask)
    return _attend(q, k, v, scale, mask)


def _cached_attention(
    qkv: Any,
    past_key: Any,
    past_value: Any,
    seqlens_k: Any,
    total_sequence_length: Any,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    cos: Any = None,
    sin: Any = None,
    bias: Any = None,
) -> Any:
    capacity, head_dim = past_key.shape[2], past_key.shape[3]
    heads = _op.Reshape(qkv, [0, 0, -1, head_dim])
    query, key, value = _split(heads, 2, num_heads, num_kv_heads, num_kv_heads)  # (B, S, heads, D)
    starts, positions = _positions(qkv, seqlens_k, total_sequence_length)  # (B,), (B, S)
    if cos is not None:
        query, key = (_rotate(x, cos, sin, positions) for x in (query, key))
    query, key, value = (_op.Transpose(x, perm=[0, 2, 1, 3]) for x in (query, key, value))
    present_key = _TENSOR_SCATTER(past_key, key, starts, axis=-2, mode="linear")
    present_value = _TENSOR_SCATTER(past_value, value, starts, axis=-2, mode="linear")
    keys = _op.Reshape(_op.Constant(value_ints=range(capacity)), [1, 1, 1, capacity])
    mask = _op.LessOrEqual(keys, _op.Unsqueeze(positions, [1, 3]))  # (B, 1, S, T)
    return _attend(query, present_key, present_value, scale, _masked(bias, mask)), present_key, present_value


def _cross_attention(query: Any, key: Any, value: Any, seqlens_k: Any, total_sequence_length: Any, scale: float) -> Any:
    """The cache is read and never written: as an output of the graph it is its input (:func:`finish_tensorrt`)."""
    del total_sequence_length  # the mask hides what lies behind each row's own length
    num_heads, capacity = key.shape[1], key.shape[2]
    keys = _op.Reshape(_op.Constant(value_ints=range(capacity)), [1, 1, 1, capacity])
    last = _op.Unsqueeze(_op.Cast(seqlens_k, to=_INT64), [1, 2, 3])  # (B, 1, 1, 1)
    mask = _op.LessOrEqual(keys, last)  # (B, 1, 1, T)
    attended = _attend(_split_heads(query, num_heads), key, value, scale, mask)
    return attended, _op.Identity(key), _op.Identity(value)


def _distance_bias(table: Any, position_ids: Any, total_sequence_length: Any, cache: Any) -> Any:
    del total_sequence_length  # a value that decides a shape would have to come from the host
    keys = _op.Constant(value_ints=range(cache.shape[2]))  # (T,)
    distances = _op.Max(_op.Min(_op.Sub(position_ids, keys), table.shape[0] - 1), 0)  # (B, T)
    return _op.Unsqueeze(_op.Transpose(_op.Gather(table, distances), perm=[0, 2, 1]), [2])


def _rms_norm(x: Any, weight: Any, epsilon: float) -> Any:
    wide = _op.Cast(x, to=onnx.TensorProto.FLOAT)
    mean_square = _op.ReduceMean(_op.Mul(wide, wide), [-1], keepdims=1)
    normed = _op.Div(wide, _op.Sqrt(_op.Add(mean_square, epsilon)))
    return _op.Mul(_op.CastLike(normed, weight), weight)


def _attend(query: Any, key: Any, value: Any, scale: float, mask: Any) -> Any:
    """(B, H, S, D) and twice (B, H_kv, L, D) -> (B, S, H * D)"""
    scaled = query if scale == 1.0 else _op.Mul(query, _op.CastLike(scale, query))
    attended = _TRT_ATTENTION(scaled, key, value, mask, TRT_decomposable=1)
    return _op.Reshape(_op.Transpose(attended, perm=[0, 2, 1, 3]), [0, 0, -1])


def _positions(qkv: Any, seqlens_k: Any, total_sequence_length: Any) -> tuple[Any, Any]:
    """Where each row's new tokens begin (B,), and the position of each (B, S): 0.. in a prefill, the last in a step."""
    length = _op.Shape(qkv, start=1, end=2)  # (1,)
    longest = _op.Cast(total_sequence_length, to=_INT64)
    ends = _op.Add(_op.Cast(seqlens_k, to=_INT64), 1)  # (B,)
    starts = _op.Where(_op.Equal(length, longest), _op.Sub(ends, ends), _op.Sub(ends, length))
    offsets = _op.Range(0, _op.Squeeze(length, [0]), 1)  # (S,)
    return starts, _op.Add(_op.Unsqueeze(starts, [1]), offsets)


def _rotate(x: Any, cos: Any, sin: Any, positions: Any) -> Any:
    """x (B, S, H, D) by the angles of positions (B, S), the first half of each head against the second."""
    first, second = _split(x, 3, cos.shape[1], cos.shape[1])
    c, s = (_op.Unsqueeze(_op.Gather(table, positions), [2]) for table in (cos, sin))  # (B, S, 1, D / 2)
    turned = (
        _op.Sub(_op.Mul(first, c), _op.Mul(second, s)),
        _op.Add(_op.Mul(second, c), _op.Mul(first, s)),
    )
    return _op.Concat(*turned, axis=-1)


def _masked(bias: Any, visible: Any) -> Any:
    """What the operator takes as its mask: the boolean mask itself, or the bias with what is hidden pushed down."""
    if bias is None:
        return visible
    return _op.Where(visible, bias, _op.CastLike(_HIDDEN, bias))


def _split(x: Any, axis: int, *sizes: int) -> list[Any]:
    ends = list(itertools.accumulate(sizes))
    return [_op.Slice(x, [end - size], [end], [axis]) for size, end in zip(sizes, ends, strict=True)]


def _split_heads(x: Any, num_heads: int) -> Any:
    return _op.Transpose(_op.Reshape(x, [0, 0, num_heads, -1]), perm=[0, 2, 1, 3])


_TRT_ATTENTION = declare(
    DOMAIN,
    ATTENTION,
    ["Q", "K", "V", "attn_mask?:A", "query_lengths?:M", "kv_lengths?:M"],
    ["Y"],
    {
        "query_form": Schema.AttrType.STRING,
        "kv_form": Schema.AttrType.STRING,
        "causal_kind": Schema.AttrType.STRING,
        "TRT_decomposable": Schema.AttrType.INT,
        "TRT_normalization_op": Schema.AttrType.STRING,
        "nb_rank": Schema.AttrType.INT,
    },
    like=0,
)

_TENSOR_SCATTER = declare(
    DOMAIN,  # until the graph is finished: the exporter knows no opset as new as the operator's own
    "TensorScatter",
    ["past_cache", "update", "write_indices?:P"],
    ["present_cache"],
    {"axis": Schema.AttrType.INT, "mode": Schema.AttrType.STRING},
)
