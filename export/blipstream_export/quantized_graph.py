"""Replacing the linear layers of a graph by quantized ones, for ONNX Runtime on the CPU.

int8: weights have one scale for each output channel. An input is rounded row by row as it comes, by the row's largest
value, so that a row's result does not depend on the rows beside it. Where that would lose too much, what it loses is
rounded as well and multiplied with the same weights (two *digits*): twice the multiplications, yet the same weights to
fetch from memory, which is what a decode step waits for.

Processors without dot-product instructions (AVX2) add pairs of products in 16 bits, and saturate. The ranges of
activations and weights are such that 2 * activation * weight stays below 2 ** 15: results are the same everywhere.

int4: ``MatMulNBits``, which rounds its input itself, by blocks. The head, and the embeddings that it shares, stay int8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from blipstream.contract import DECODER_IO
from blipstream.manifest import Precision
from blipstream_export.activations import STEPS, Activations
from blipstream_export.initializers import Parts, WeightTensor
from blipstream_export.quantization import BLOCK, quantize_blocks, quantize_channels

MAX_ONE_DIGIT_ERROR = 0.02
"""A layer gets a second digit when rounding its input to one would lose more than this, relative to the input."""

_GELU_SHIFT = 0.17
"""GELU is above -0.17 everywhere."""

_DIGIT = 64
"""Steps of one digit of two, either way of zero."""

_BASE = 2 * _DIGIT
"""Steps of the second digit in one of the first."""

_LARGEST_WEIGHT = {1: 90, 2: 127}
"""Range of the weights, by the number of digits that they are multiplied with: 2 * (2 * 91) * 90 and 2 * (2 * 64) * 127
are below 2 ** 15. Of the splits that fit 16 bits, about as much for the weights as for an input rounded once loses the
least."""

_HEAD_DIGITS = 2
"""The head decides the token."""

_INT8_FORMS = {1: "int8", 2: "int8, two digits"}
_TINY = 1e-30
_ACCURACY_INT8 = 4
_CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class LayerPrecision:
    """How one matrix was quantized, and why."""

    weight: str
    """Names of the checkpoint's parameters that it is made of."""
    form: str
    """``int8``, ``int8, two digits``, ``int4``; of embeddings that are only looked up, ``int8, looked up``. For
    TensorRT, ``int8`` or ``fp8``."""
    rounding_error: float | None = None
    """What rounding the input to one digit would lose on the samples, relative to the input; None where that does not
    decide (the head, int4, embeddings) or was not measured."""


OnLayer = Callable[[LayerPrecision], None]


@dataclass(frozen=True)
class _Linear:
    """A node that multiplies its first input with a weight."""

    node: ir.Node
    weight: ir.Value
    rows_are_outputs: bool
    """The weight is (N, K) rather than (K, N)."""
    bias: ir.Value | None

    @property
    def tensor(self) -> WeightTensor:
        tensor = self.weight.const_value
        assert isinstance(tensor, WeightTensor)
        return tensor

    @property
    def size(self) -> tuple[int, int]:
        """Inputs K and outputs N."""
        first, second = (int(dim) for dim in self.tensor.shape.numpy())
        return (second, first) if self.rows_are_outputs else (first, second)

    def compute(self) -> Tensor:
        """The weight as (N, K)."""
        tensor = self.tensor.compute()
        return tensor if self.rows_are_outputs else tensor.T


def quantize_graph(
    model: ir.Model,
    precision: Precision,
    activations: Activations | None,
    head_tables: Sequence[str] = (),
    on_layer: OnLayer = lambda _layer: None,
) -> None:
    """Replace every linear layer by one in int8 or int4; other precisions leave the graph as it is.

    Args:
        model: the graph, whose weights are :class:`~blipstream_export.initializers.WeightTensor`.
        precision: of its stage.
        activations: what the layers read; a layer that is not among them gets two digits.
        head_tables: embeddings that are looked up in the form that the head of another graph has them in.
        on_layer: is told of each matrix.
    """
    if precision not in ("int8", "int4"):
        return
    graph = model.graph
    model.opset_imports.setdefault(_CONTRIB, 1)
    builder = _Builder(graph, activations or Activations(), on_layer)
    for linear in list(_linear_layers(graph)):
        gathers = _lookups(linear.weight)
        if precision == "int4" and not builder.is_head(linear):
            builder.four_bits(linear)
        else:
            values, scales = builder.eight_bits(linear)
            for gather in gathers:
                builder.look_up(gather, values, scales)
    for name in head_tables:
        builder.table(graph.initializers[name])
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            graph.initializers.pop(name)


def is_head(graph: ir.Graph, weight: ir.Value, outputs: int) -> bool:
    """Whether a weight with so many outputs gives the logits: it is as wide as they, or that of the embeddings."""
    widths = [x.shape[-1] for x in graph.outputs if x.name == DECODER_IO.logits and x.shape]
    return outputs in widths or bool(_lookups(weight))


def _linear_layers(graph: ir.Graph) -> Iterator[_Linear]:
    for node in graph:
        if node.op_type == "Gemm":
            weight, plain = _weight(node.inputs[1]), not node.attributes.get_int("transA", 0)
            plain &= all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
            if weight is not None and plain:
                bias = node.inputs[2] if len(node.inputs) > 2 else None
                yield _Linear(node, weight, bool(node.attributes.get_int("transB", 0)), bias)
        elif node.op_type == "MatMul" and (weight := _weight(node.inputs[1])) is not None:
            yield _Linear(node, weight, False, None)
        elif node.op_type == "MatMul" and (turned := _transposed_weight(node)) is not None:
            yield _Linear(node, turned, True, None)


def _weight(value: ir.Value | None) -> ir.Value | None:
    """The value, if it is a matrix of the checkpoint."""
    if value is None or not isinstance(value.const_value, WeightTensor) or len(value.const_value.shape) != 2:
        return None
    return value


def _transposed_weight(node: ir.Node) -> ir.Value | None:
    turned = node.inputs[1].producer() if node.inputs[1] is not None else None
    return _weight(turned.inputs[0]) if turned is not None and turned.op_type == "Transpose" else None


def _lookups(table: ir.Value) -> list[ir.Node]:
    return [node for node, index in table.uses() if node.op_type == "Gather" and index == 0]


def _value(initializer: ir.Value) -> Tensor:
    tensor = initializer.const_value
    assert tensor is not None
    return tensor.compute() if isinstance(tensor, WeightTensor) else torch.from_numpy(tensor.numpy())


def _int8_parts(weight: Tensor, digits: int) -> dict[str, Tensor]:
    """A weight (N, K) as values (K, N) and their scales (N,)."""
    values, scales = quantize_channels(weight, _LARGEST_WEIGHT[digits])
    return {"values": values.T.contiguous(), "scales": scales}


class _Builder:
    """Writes nodes in front of the one that they replace."""

    def __init__(self, graph: ir.Graph, activations: Activations, on_layer: OnLayer) -> None:
        self._graph = graph
        self._on_layer = on_layer
        self._activations = activations
        self._rounded: dict[tuple[ir.Value, float | None, int], tuple[ir.Value, ir.Value]] = {}
        self._before: ir.Node
        self._prefix = ""

    def is_head(self, linear: _Linear) -> bool:
        """Whether the layer gives the logits."""
        return is_head(self._graph, linear.weight, linear.size[1])

    # --- layers ------------------------------------------------------------------------------------------------------

    def eight_bits(self, linear: _Linear) -> tuple[ir.Value, ir.Value]:
        """Replace a layer by one in int8; return its weights (K, N) and their scales (N,)."""
        self._begin(linear.node, linear.weight.name)
        x = linear.node.inputs[0]
        assert x is not None
        shift, digits = self._rounding(linear, x)
        values, scales, bias = self._int8_weights(linear, shift, digits)
        rounded, row_scales = self._round(x, shift, digits)
        zero = self._zero_point(shift, digits)
        one = self._constant("one", np.float32(1))
        product = self._op("MatMulIntegerToFloat", rounded, values, one, scales, zero, domain=_CONTRIB)
        if digits == 2:
            high, low = self._ops("Split", 2, product, axis=0, num_outputs=2)
            product = self._op("Add", high, self._op("Mul", low, self._constant("digit", np.float32(1 / _BASE))))
        product = self._op("Mul", product, row_scales)
        self._finish(linear.node, product if bias is None else self._op("Add", product, bias))
        return values, scales

    def four_bits(self, linear: _Linear) -> None:
        """Replace a layer by ``MatMulNBits``."""
        self._begin(linear.node, linear.weight.name)
        (inputs, outputs), blocks = linear.size, -(-linear.size[0] // BLOCK)
        parts = Parts(lambda: dict(zip(("codes", "scales"), quantize_blocks(linear.compute()), strict=True)))
        codes = self._weight(parts, "codes", torch.uint8, (outputs, blocks, BLOCK // 2))
        scales = self._weight(parts, "scales", torch.float32, (outputs, blocks), torch.float16)
        attributes = {"K": inputs, "N": outputs, "bits": 4, "block_size": BLOCK, "accuracy_level": _ACCURACY_INT8}
        operands = (linear.node.inputs[0], codes, scales, None, None, linear.bias)
        self._tell(linear.weight, "int4")
        self._finish(linear.node, self._op("MatMulNBits", *operands, domain=_CONTRIB, **attributes))

    def table(self, table: ir.Value) -> None:
        """Quantize embeddings (N, K) as a head's weights (K, N), and let lookups read them."""
        tensor = table.const_value
        assert isinstance(tensor, WeightTensor)
        outputs, inputs = (int(dim) for dim in tensor.shape.numpy())
        gathers = _lookups(table)
        self._tell(table, "int8, looked up")
        self._begin(gathers[0], table.name)
        parts = Parts(lambda: _int8_parts(tensor.compute(), _HEAD_DIGITS))
        values = self._weight(parts, "values", torch.int8, (inputs, outputs))
        scales = self._weight(parts, "scales", torch.float32, (outputs,))
        for gather in gathers:
            self.look_up(gather, values, scales)

    def look_up(self, gather: ir.Node, values: ir.Value, scales: ir.Value) -> None:
        """Let a lookup of embeddings (N, K) read the columns of int8 weights (K, N)."""
        self._begin(gather, f"{gather.outputs[0].name}")
        ids = gather.inputs[1]
        rank = len(gather.outputs[0].shape or ())
        columns = self._op("Gather", values, ids, axis=1)  # (K, ...)
        rows = self._op("Cast", self._op("Transpose", columns, perm=[*range(1, rank), 0]), to=ir.DataType.FLOAT)
        last = self._constant("last_axis", np.array([-1], np.int64))
        row_scales = self._op("Unsqueeze", self._op("Gather", scales, ids, axis=0), last)
        self._finish(gather, self._op("Mul", rows, row_scales))

    def _tell(self, weight: ir.Value, form: str, error: float | None = None) -> None:
        tensor = weight.const_value
        assert isinstance(tensor, WeightTensor)
        name = ", ".join(sorted(tensor.labels)) or f"{weight.name}"
        self._on_layer(LayerPrecision(name, form, None if error is None else float(f"{error:.2g}")))

    # --- parts of a layer --------------------------------------------------------------------------------------------

    def _rounding(self, linear: _Linear, x: ir.Value) -> tuple[float | None, int]:
        """What to add to the input before it is rounded, if it is bounded below; and the number of digits."""
        if self.is_head(linear):
            self._tell(linear.weight, _INT8_FORMS[_HEAD_DIGITS])
            return None, _HEAD_DIGITS
        producer = x.producer()
        shift = {"Relu": 0.0, "Gelu": _GELU_SHIFT}.get(producer.op_type if producer is not None else "")
        error = self._activations.rounding_error(linear.tensor.labels, shift) if linear.tensor.labels else None
        digits = 2 if error is None or error > MAX_ONE_DIGIT_ERROR else 1
        self._tell(linear.weight, _INT8_FORMS[digits], error)
        return (None if digits == 2 else shift), digits  # the remainder takes both signs

    def _int8_weights(
        self, linear: _Linear, shift: float | None, digits: int
    ) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        """Weights (K, N), their scales (N,), and the bias, less what the shift of the input adds to the output."""
        inputs, outputs = linear.size

        def compute() -> dict[str, Tensor]:
            parts = _int8_parts(linear.compute(), digits)
            if shift:
                added = parts["values"].sum(dim=0) * parts["scales"] * shift
                parts["bias"] = -added if linear.bias is None else _value(linear.bias) - added
            return parts

        parts = Parts(compute)
        return (
            self._weight(parts, "values", torch.int8, (inputs, outputs)),
            self._weight(parts, "scales", torch.float32, (outputs,)),
            self._weight(parts, "bias", torch.float32, (outputs,)) if shift else linear.bias,
        )

    def _round(self, x: ir.Value, shift: float | None, digits: int) -> tuple[ir.Value, ir.Value]:
        """An input (..., K) as uint8, its two digits behind one another, and the scale (..., 1) of each row."""
        key = (x, shift, digits)
        if key in self._rounded:
            return self._rounded[key]
        steps = (STEPS if digits == 1 else _DIGIT) * (1 if shift is None else 2)
        if shift:
            x = self._op("Add", x, self._constant("shift", np.float32(shift)))
        last = self._constant("last_axis", np.array([-1], np.int64))
        largest = self._op("ReduceMax", self._op("Abs", x) if shift is None else x, last, keepdims=1)
        largest = self._op("Max", largest, self._constant("tiny", np.float32(_TINY)))
        scale = self._op("Mul", largest, self._constant("step", np.float32(1 / steps)))
        x = self._op("Div", x, scale)
        if digits == 2:
            high = self._op("Round", x)
            low = self._op("Mul", self._op("Sub", x, high), self._constant("base", np.float32(_BASE)))
            x = self._op("Concat", high, low, axis=0)
        one = self._constant("one", np.float32(1))
        self._rounded[key] = self._op("QuantizeLinear", x, one, self._zero_point(shift, digits)), scale
        return self._rounded[key]

    def _zero_point(self, shift: float | None, digits: int) -> ir.Value:
        """What zero becomes in uint8: the middle of the range, or its end where nothing is negative."""
        middle = STEPS if digits == 1 else _DIGIT
        return self._constant("zero_point", np.uint8(middle if shift is None else 0))

    # --- writing nodes -----------------------------------------------------------------------------------------------

    def _begin(self, node: ir.Node, prefix: str | None) -> None:
        self._before, self._prefix, self._count = node, f"{prefix}", 0

    def _finish(self, node: ir.Node, output: ir.Value) -> None:
        """Put ``output`` in the place of a node's output, name and all, and remove the node."""
        old = node.outputs[0]
        output.name, output.shape, output.type = old.name, old.shape, old.type
        old.name = f"{old.name}.replaced"
        ir.convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
        turned = node.inputs[1].producer() if node.inputs[1] is not None else None
        self._graph.remove(node, safe=True)
        if turned is not None and not turned.outputs[0].uses():
            self._graph.remove(turned, safe=True)

    def _op(self, name: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        (output,) = self._ops(name, 1, *inputs, domain=domain, **attributes)
        return output

    def _ops(
        self, name: str, count: int, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> tuple[ir.Value, ...]:
        self._count += 1
        outputs = [ir.Value(name=f"{self._prefix}.quantized.{self._count}.{index}") for index in range(count)]
        node = ir.node(name, inputs, attributes, domain=domain, outputs=outputs)
        node.name = f"{self._prefix}.quantized.{self._count}"
        self._graph.insert_before(self._before, node)
        return tuple(outputs)

    def _constant(self, name: str, value: Any) -> ir.Value:
        array = np.asarray(value)
        key = f"quantized.{name}.{array.dtype}.{array.reshape(-1)[0]}"
        return self._initializer(key, ir.Tensor(array, name=key))

    def _weight(
        self,
        parts: Parts,
        part: str,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        own_type: torch.dtype | None = None,
    ) -> ir.Value:
        name = f"{self._prefix}.{part}"
        tensor = WeightTensor(lambda: parts.take(part), dtype, shape, name=name, own_type=own_type)
        return self._initializer(name, tensor)

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        if name not in self._graph.initializers:
            shape = ir.Shape(tensor.shape.numpy())
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
            self._graph.register_initializer(value)
        return self._graph.initializers[name]
