"""Which operators the ONNX importer of TensorRT reads, and of which types: a graph is checked before it is built.

Source: docs/operators.md of onnx-tensorrt, as of its release for TensorRT 10.15; later releases added operators and
took none away. What is not listed there for a type is refused here, though the importer may read it.
"""

from __future__ import annotations

import onnx_ir as ir

from blipstream.errors import EngineError
from blipstream_export.lowering.plugins import MERGE, PLUGIN_DOMAIN, SPLIT, WHOLE
from blipstream_export.lowering.tensorrt import ATTENTION, DOMAIN

_T = ir.DataType
_FLOATS = frozenset({_T.FLOAT, _T.FLOAT16, _T.BFLOAT16})
_NUMBERS = _FLOATS | {_T.INT32, _T.INT64}
_ALL = _NUMBERS | {_T.BOOL}
_BOOL = frozenset({_T.BOOL})
_ANY = _ALL | {_T.UINT8, _T.INT8, _T.INT4, _T.FLOAT8E4M3FN}

_BY_TYPES: dict[frozenset[ir.DataType], str] = {
    _FLOATS: """
        Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos Cosh
        CumSum Dropout Einsum Elu Erf Exp Floor Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool
        GroupNormalization GRU HardSigmoid HardSwish Hardmax InstanceNormalization IsInf LayerNormalization LeakyRelu
        Log LogSoftmax LRN LSTM LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization PRelu QuantizeLinear
        RMSNormalization RNN Reciprocal Resize RotaryEmbedding Round Scan Selu Sigmoid Sin Sinh Softmax Softplus
        Softsign Sqrt Tan Tanh ThresholdedRelu Attention""",
    _NUMBERS: """
        Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max Mean Min Mod Mul
        Neg Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
        ReduceSum ReduceSumSquare Relu ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK""",
    _ALL: """
        Concat Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot Reshape ReverseSequence
        Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where""",
    _ANY: "Cast CastLike Constant ConstantOfShape DequantizeLinear",
    _BOOL: "And Not Or Xor",
    _FLOATS | {_T.INT32}: "TensorScatter",
}
_TYPES = {name: types for types, names in _BY_TYPES.items() for name in names.split()}


def check_importable(model: ir.Model) -> None:
    """Refuse a graph that the importer does not read.

    Raises:
        EngineError: the message names every operator, with its type, that is not read, and why.
    """
    faults = sorted({fault for node in model.graph.all_nodes() if (fault := _fault(node)) is not None})
    if faults:
        raise EngineError(f"the graph {model.graph.name} is not one that TensorRT reads: {'; '.join(faults)}")


def _fault(node: ir.Node) -> str | None:
    if node.domain == DOMAIN:
        return None if node.op_type == ATTENTION else f"{node.domain}.{node.op_type} is none of its operators"
    if node.domain == PLUGIN_DOMAIN:
        return None if node.op_type in (WHOLE, SPLIT, MERGE) else f"there is no plugin {node.op_type}"
    types = _TYPES.get(node.op_type) if node.domain == "" else None
    if types is None:
        return f"{node.domain or 'ONNX'}.{node.op_type} is not read"
    data = node.inputs[1] if node.op_type == "Where" else next(iter(node.inputs), None)
    if data is not None and data.dtype is not None and data.dtype not in types:
        return f"{node.op_type} is not read for {data.dtype.name}"
    if node.op_type in ("Squeeze", "Unsqueeze") or node.op_type.startswith("Reduce"):
        axes = node.inputs[1] if len(node.inputs) > 1 else None
        if axes is None or ir.convenience.get_const_tensor(axes) is None:
            return f"{node.op_type} is read with constant axes alone"
    if node.op_type == "TensorScatter":
        return _cache_fault(node)
    return None


def _cache_fault(node: ir.Node) -> str | None:
    """A cache is an input of the network and an output, with a length that is known at build time."""
    cache = node.inputs[0]
    assert cache is not None
    if not cache.is_graph_input() or not node.outputs[0].is_graph_output():
        return "TensorScatter is read where its cache is an input of the graph and its result an output"
    if cache.shape is None or len(cache.shape) != 4 or not isinstance(cache.shape[2], int):
        return "TensorScatter is read for a cache (B, H, T, D) of which T is known"
    return None
