"""Graphs for TensorRT in int8 and fp8: calibrated by NVIDIA's ModelOpt, quantized here.

A network of TensorRT computes in 8 bits where its graph says so: a value goes through ``QuantizeLinear`` and
``DequantizeLinear``, whose scales are constants of the graph. ModelOpt runs the graph's standard form
(:mod:`blipstream_export.lowering.tensorrt_reference`) on samples, and finds the largest absolute value that each matrix
product reads, and that each output channel of its weight has. The graph itself keeps its attention, its caches and all
else: of ModelOpt's own graph only the ranges are taken. They are the same for both formats, so that ModelOpt is always
asked for int8; what it makes of fp8 (0.47: the scales of int8 times 448 / 127) uses a twelfth of fp8's range.

What is quantized: ``Gemm`` and ``MatMul`` with a constant matrix, activations with one scale, weights with one for each
output channel. What is not: the head, which decides the token and often shares its weight with the embeddings; the
patch embedding, a convolution of three channels; attention; all that is not a product.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from blipstream.errors import EngineError
from blipstream.extras import needing
from blipstream_export.initializers import WeightTensor, write_model
from blipstream_export.lowering.tensorrt_reference import write_standard_form
from blipstream_export.plans.samples import Feed
from blipstream_export.quantized_graph import LayerPrecision, is_head

QuantizedPrecision = Literal["int8", "fp8"]


@dataclass(frozen=True)
class _Format:
    """A type of 8 bits."""

    dtype: torch.dtype
    ir_type: ir.DataType
    largest: float

    def round(self, values: torch.Tensor) -> torch.Tensor:
        """Values, divided by their scale, in this type; what is beyond the range becomes its end."""
        values = values.clamp(-self.largest, self.largest)
        return (values if self.dtype.is_floating_point else values.round()).to(self.dtype)


_FORMATS: Mapping[QuantizedPrecision, _Format] = {
    "int8": _Format(torch.int8, ir.DataType.INT8, 127),
    "fp8": _Format(torch.float8_e4m3fn, ir.DataType.FLOAT8E4M3FN, 448),
}
_CALIBRATED_IN = _FORMATS["int8"]

_SMALLEST_SCALE = 2.0**-20
"""A scale may be fp16, whose smallest values have few digits; a channel below 127 of these is nothing beside others."""

_OPERATORS = ("Gemm", "MatMul")


@dataclass(frozen=True)
class _Range:
    """Largest absolute values of what a product reads on the samples, and of its weight for each output channel."""

    activation: float
    weight: npt.NDArray[np.float32]
    """(N,)"""


@dataclass(frozen=True)
class _Product:
    """A node that multiplies its first input with a constant matrix."""

    node: ir.Node
    weight: ir.Value
    axis: int
    """Of the weight's output channels."""

    @property
    def name(self) -> str:
        return str(self.node.name)

    @property
    def outputs(self) -> int:
        """Output channels N."""
        assert self.weight.shape is not None
        return int(self.weight.shape[self.axis])  # type: ignore[arg-type]  # an initializer's shape is known


def quantize_graph(
    graph: Path,
    output: Path,
    precision: QuantizedPrecision,
    feeds: Iterable[Feed],
    exclude: Collection[str] = (),
) -> tuple[LayerPrecision, ...]:
    """Quantize the matrix products of a graph for TensorRT.

    Args:
        graph: the graph, which computes in fp16 or fp32.
        output: another file, beside which weights go that do not fit into it.
        precision: of the products.
        feeds: inputs of the graph, as it will be given when it serves; each is read once.
        exclude: names of nodes that stay as they are, besides the head.

    Returns:
        What was quantized, by the names that weights have in the graph.

    Raises:
        EngineError: ModelOpt is not installed, a name is not that of a product, or ModelOpt found no range for one.
    """
    model = ir.load(graph)
    products = {product.name: product for product in _products(model.graph)}
    if unknown := sorted(set(exclude) - set(products)):
        raise EngineError(f"{graph.name} has no matrix product {', '.join(unknown)}: expected some of {[*products]}")
    chosen = [product for name, product in products.items() if name not in exclude and not _is_head(model, product)]
    ranges = _calibrate(graph, chosen, feeds) if chosen else {}
    quantizer = _Quantizer(model.graph, precision)
    for product in chosen:
        quantizer.quantize(product, ranges[product.name])
    _compute_on_writing(model.graph)
    write_model(model, output, "fp32")
    return tuple(LayerPrecision(str(product.weight.name), precision) for product in chosen)


def _products(graph: ir.Graph) -> Iterator[_Product]:
    for node in graph:
        weight = node.inputs[1] if node.op_type in _OPERATORS else None
        if weight is None or not weight.is_initializer() or weight.shape is None or len(weight.shape) != 2:
            continue
        yield _Product(node, weight, 0 if node.attributes.get_int("transB", 0) else 1)


def _is_head(model: ir.Model, product: _Product) -> bool:
    return is_head(model.graph, product.weight, product.outputs)


# --- calibration -----------------------------------------------------------------------------------------------------


def _calibrate(graph: Path, products: Sequence[_Product], feeds: Iterable[Feed]) -> dict[str, _Range]:
    """The ranges of each product, by the name of its node, as ModelOpt finds them."""
    modelopt = _modelopt()
    names = [product.name for product in products]
    with tempfile.TemporaryDirectory(prefix="calibration.", dir=graph.parent) as folder:
        standard = graph.with_name(f"{Path(folder).name}.onnx")  # beside the graph, where its weights are
        calibrated = Path(folder, "calibrated.onnx")
        try:
            write_standard_form(graph, standard)
            with _quiet_onnxruntime(), _without_tensorrt(modelopt):
                modelopt.quantization.quantize(
                    str(standard),
                    quantize_mode="int8",
                    calibration_method="max",
                    calibration_data_reader=_reader(feeds),
                    calibration_eps=["cpu"],
                    op_types_to_quantize=list(_OPERATORS),
                    nodes_to_quantize=[f"{re.escape(name)}$" for name in names],
                    disable_mha_qdq=True,
                    enable_gemv_detection_for_trt=False,
                    high_precision_dtype="fp32",  # "as it is": what is fp16 stays so
                    use_external_data_format=_has_external_weights(graph),
                    output_path=str(calibrated),
                    log_level="CRITICAL",
                )
            nodes = {node.name: node for node in ir.load(calibrated).graph}
            return {name: _read_range(nodes.get(name), name) for name in names}
        finally:
            standard.unlink(missing_ok=True)


def check_modelopt() -> None:
    """See that ModelOpt is there.

    Raises:
        EngineError: it is not installed.
    """
    _modelopt()


def _modelopt() -> Any:
    """Its module ``modelopt.onnx``, with what is used of it imported."""
    with needing("quantize", EngineError):
        import modelopt.onnx
        import modelopt.onnx.quantization
        import modelopt.onnx.trt_utils
    return modelopt.onnx


def _reader(feeds: Iterable[Feed]) -> Any:
    """What ModelOpt reads samples from; a class of ONNX Runtime, which is heavy to import."""
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime has no stubs
        def __init__(self) -> None:
            self._feeds = iter(feeds)

        def get_next(self) -> Any:
            return next(self._feeds, None)

    return Reader()


def _read_range(node: ir.Node | None, name: str) -> _Range:
    scales = [] if node is None else [_scale(value) for value in node.inputs[:2]]
    if not scales or any(scale is None for scale in scales):
        raise EngineError(f"ModelOpt found no range for {name}")
    activation, weight = (np.asarray(scale, np.float32) * _CALIBRATED_IN.largest for scale in scales)
    if not np.isfinite(activation):
        raise EngineError(f"what {name} reads on the samples is not finite")
    return _Range(float(activation), weight)


def _scale(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """That of the DequantizeLinear that gives a value."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[1] is None:
        return None
    tensor = ir.convenience.get_const_tensor(node.inputs[1])
    return None if tensor is None else tensor.numpy()


def _has_external_weights(graph: Path) -> bool:
    return any(isinstance(value.const_value, ir.ExternalTensor) for value in ir.load(graph).graph.initializers.values())


@contextmanager
def _without_tensorrt(modelopt: Any) -> Iterator[None]:
    """Keep ModelOpt from letting TensorRT parse the graph, in search of plugins: the standard form has none."""
    available, modelopt.trt_utils.TRT_PYTHON_AVAILABLE = modelopt.trt_utils.TRT_PYTHON_AVAILABLE, False
    try:
        yield
    finally:
        modelopt.trt_utils.TRT_PYTHON_AVAILABLE = available


@contextmanager
def _quiet_onnxruntime() -> Iterator[None]:
    """Errors alone: on the CPU it remarks of every cache that it is copied."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(2)


# --- writing ---------------------------------------------------------------------------------------------------------


class _Quantizer:
    """Puts QuantizeLinear and DequantizeLinear in front of products."""

    def __init__(self, graph: ir.Graph, precision: QuantizedPrecision) -> None:
        self._graph = graph
        self._precision = precision
        self._format = _FORMATS[precision]
        self._activations: dict[ir.Value, ir.Value] = {}
        self._weights: dict[ir.Value, ir.Value] = {}

    def quantize(self, product: _Product, limits: _Range) -> None:
        """Let a product read what it reads, and its weight, in 8 bits."""
        x, weight = product.node.inputs[0], product.weight
        assert x is not None
        if x not in self._activations:
            self._activations[x] = self._activation(x, product.node, limits.activation)
        if weight not in self._weights:
            self._weights[weight] = self._weight(product, limits.weight)
        product.node.replace_input_with(0, self._activations[x])
        product.node.replace_input_with(1, self._weights[weight])
        if not weight.uses() and str(weight.name) in self._graph.initializers:
            self._graph.initializers.pop(str(weight.name))

    def _activation(self, x: ir.Value, before: ir.Node, limit: float) -> ir.Value:
        scale, zero = self._parameters(x, self._scales(np.float32(limit)))
        rounded = self._node("QuantizeLinear", [x, scale, zero], before, f"{x.name}.{self._precision}")
        rounded.shape, rounded.type = x.shape, ir.TensorType(self._format.ir_type)
        return self._dequantized(rounded, scale, zero, before, x)

    def _weight(self, product: _Product, limits: npt.NDArray[np.float32]) -> ir.Value:
        weight, axis, scales = product.weight, product.axis, self._scales(limits)
        source, rounded_by = weight.const_value, self._format.round
        assert source is not None
        divisors = torch.from_numpy(scales.astype(source.dtype.numpy()).astype(np.float32))

        def compute() -> torch.Tensor:
            return rounded_by(torch.from_numpy(source.numpy().astype(np.float32)) / divisors.unsqueeze(1 - axis))

        name = f"{weight.name}.{self._precision}"
        stored = self._initializer(WeightTensor(compute, self._format.dtype, tuple(source.shape.numpy()), name=name))
        scale, zero = self._parameters(weight, scales)
        return self._dequantized(stored, scale, zero, product.node, weight, axis=axis)

    def _scales(self, limits: Any) -> Any:
        return np.maximum(limits / np.float32(self._format.largest), np.float32(_SMALLEST_SCALE))

    def _parameters(self, value: ir.Value, scales: Any) -> tuple[ir.Value, ir.Value]:
        """Scales of the value's own type, and zero points: zero everywhere, and what tells the type of 8 bits."""
        assert value.dtype is not None
        typed = ir.Tensor(np.asarray(scales).astype(value.dtype.numpy()), name=f"{value.name}.scale")
        zeros = np.zeros(typed.shape.numpy(), self._format.ir_type.numpy())
        return self._initializer(typed), self._initializer(
            ir.Tensor(zeros, dtype=self._format.ir_type, name=f"{value.name}.zero_point")
        )

    def _dequantized(
        self, rounded: ir.Value, scale: ir.Value, zero: ir.Value, before: ir.Node, like: ir.Value, **attributes: int
    ) -> ir.Value:
        name = f"{like.name}.dequantized"
        output = self._node("DequantizeLinear", [rounded, scale, zero], before, name, **attributes)
        output.shape, output.type = like.shape, like.type
        return output

    def _node(self, op: str, inputs: Sequence[ir.Value], before: ir.Node, name: str, **attributes: int) -> ir.Value:
        node = ir.node(op, inputs, attributes, outputs=[ir.Value(name=name)], name=name)
        self._graph.insert_before(before, node)
        return node.outputs[0]

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=tensor.name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        self._graph.register_initializer(value)
        return value


def _compute_on_writing(graph: ir.Graph) -> None:
    """Let weights that lie in a file of the old graph be copied into one of the new."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            dtype = torch.from_numpy(np.empty(0, tensor.dtype.numpy())).dtype
            value.const_value = WeightTensor(
                lambda tensor=tensor: torch.from_numpy(np.array(tensor.numpy())),  # type: ignore[misc]
                dtype,
                tuple(tensor.shape.numpy()),
                name=str(value.name),
            )
