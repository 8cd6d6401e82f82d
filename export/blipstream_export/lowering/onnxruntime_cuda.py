"""The lowering for ONNX Runtime on a GPU: that for TensorRT, with ONNX's own Attention in place of TensorRT's.

Attention of opset 24 takes the same mask, shares heads of keys and values in the same way, and is fused by ONNX
Runtime's CUDA provider; TensorScatter updates a cache in place there too. The contrib operators of the CPU's graphs
will not do: on a GPU, GroupQueryAttention knows neither float32 nor a bias.
"""

from __future__ import annotations

import onnx_ir as ir

from blipstream_export.lowering.operators import put_in_place
from blipstream_export.lowering.tensorrt import ATTENTION, DOMAIN, finish_tensorrt


def finish_onnxruntime_cuda(model: ir.Model) -> None:
    """Do what TensorRT's graphs need, and replace TensorRT's operator."""
    finish_tensorrt(model)
    for node in list(model.graph):
        if (node.domain, node.op_type) == (DOMAIN, ATTENTION):
            attention = ir.node("Attention", node.inputs, {"scale": 1.0})  # the query comes scaled
            put_in_place(model.graph, node, [attention], attention.outputs)
    model.opset_imports.pop(DOMAIN, None)
