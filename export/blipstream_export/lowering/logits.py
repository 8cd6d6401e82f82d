"""What greedy decoding needs of the logits, computed where they are: outputs of a decoder's graph for a GPU."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from blipstream.contract import DECODER_IO


def reduce_logits(model: ir.Model) -> None:
    """Give a graph with logits (B, V) the outputs ``argmax`` INT64 (B,) and ``logit_sums`` FP32 (B,).

    Of equal logits the first is meant, as everywhere; operators that look for the largest do not promise which of them
    they give. So it is the smallest of the indices where a logit is the largest, in fp32, which holds them exactly.
    """
    graph = model.graph
    logits = next((output for output in graph.outputs if output.name == DECODER_IO.logits), None)
    if logits is None:
        return
    assert logits.shape is not None
    batch, width = logits.shape
    assert isinstance(width, int)
    indices = _constant(graph, "logits.indices", np.arange(width, dtype=np.float32))
    behind = _constant(graph, "logits.behind", np.float32(width))
    last_axis = _constant(graph, "logits.last_axis", np.array([-1], np.int64))
    largest = ir.node("ReduceMax", [logits, last_axis], {"keepdims": 1})
    equal = ir.node("Equal", [logits, largest.outputs[0]])
    candidates = ir.node("Where", [equal.outputs[0], indices, behind])
    first = ir.node("ReduceMin", [candidates.outputs[0], last_axis], {"keepdims": 0})
    argmax = ir.node("Cast", first.outputs, {"to": ir.DataType.INT64})
    sums = ir.node("ReduceSum", [logits, last_axis], {"keepdims": 0})
    graph.extend([largest, equal, candidates, first, argmax, sums])
    outputs = ((argmax, DECODER_IO.argmax, ir.DataType.INT64), (sums, DECODER_IO.sums, ir.DataType.FLOAT))
    for node, name, dtype in outputs:
        value = node.outputs[0]
        value.name, value.shape, value.dtype = name, ir.Shape([batch]), dtype
        graph.outputs.append(value)


def _constant(graph: ir.Graph, name: str, array: npt.ArrayLike) -> ir.Value:
    tensor = ir.tensor(np.asarray(array), name=name)
    value = ir.Value(name=name, shape=ir.Shape(np.shape(array)), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
