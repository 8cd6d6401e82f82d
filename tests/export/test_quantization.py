"""Quantized layers on ONNX Runtime, against the same arithmetic in NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from blipstream_export.activations import STEPS, Activations, InputStatistics, observe
from blipstream_export.graphs import GraphInputs, export_graph
from blipstream_export.quantization import BLOCK, quantize_blocks, quantize_channels
from torch import Tensor, nn

from blipstream.contract import DECODER_IO
from blipstream.engines import create_engine
from blipstream.manifest import Precision
from tests.support.deferring import defer_parameters

Floats = npt.NDArray[np.float32]


class Layers(nn.Module):
    """A layer, an activation, and a second layer."""

    def __init__(self, width: int, hidden: int, activation: nn.Module, *, bias: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, hidden, bias=bias), nn.Linear(hidden, width, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.activation(self.first(x)))


class Tied(nn.Module):
    """Embeddings that are the head as well."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self.embed(ids.reshape(-1))
        return nn.functional.linear(torch.tanh(embedded), self.embed.weight), embedded


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def export(
    module: nn.Module, sample: Tensor, path: Path, precision: Precision, activations: Activations | None = None
) -> None:
    names = ["logits", "embedded"] if isinstance(module, Tied) else ["y"]
    inputs = GraphInputs((sample,), ({0: "rows"},), ["x"], names)
    export_graph(module, inputs, path, engine="onnxruntime", precision=precision, activations=activations)


def run(path: Path, x: npt.NDArray[Any]) -> list[Floats]:
    with create_engine("onnxruntime", path, threads=1) as engine:
        return list(engine.run({"x": x}).values())


def seen(module: nn.Module, x: Tensor) -> Activations:
    """Defer the parameters of ``module`` and run it, so that its layers are known by name."""
    defer_parameters(module)
    with observe(module) as activations, torch.no_grad():
        module(x)
    return activations


def weights_of(layer: nn.Linear, largest: int) -> tuple[Floats, Floats]:
    """int8 weights (N, K) and scales (N,), by NumPy."""
    weight = np.asarray(layer.weight.detach() + torch.zeros(1), np.float32)
    scales = np.abs(weight).max(axis=1) / np.float32(largest)
    return np.rint(weight / scales[:, None]).clip(-largest, largest), scales


def bias_of(layer: nn.Linear) -> Any:
    return 0 if layer.bias is None else np.asarray(layer.bias.detach() + torch.zeros(1))


def one_digit(x: Floats, layer: nn.Linear, shift: float | None = None) -> Floats:
    weight, scales = weights_of(layer, 90)
    steps = STEPS if shift is None else 2 * STEPS
    moved = x + np.float32(shift or 0)
    row_scales = np.abs(moved).max(axis=1, keepdims=True) / steps
    rounded = np.rint(moved / row_scales)
    assert np.abs(rounded).max() <= steps
    product = (rounded @ weight.T) * scales * row_scales
    return product - (shift or 0) * (weight.sum(axis=1) * scales) + bias_of(layer)


def two_digits(x: Floats, layer: nn.Linear) -> Floats:
    weight, scales = weights_of(layer, 127)
    row_scales = np.abs(x).max(axis=1, keepdims=True) / 64
    high = np.rint(x / row_scales)
    low = np.rint((x / row_scales - high) * 128)
    return (high @ weight.T + low @ weight.T / 128) * scales * row_scales + bias_of(layer)


def assert_close(found: Floats, expected: Floats, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# --- int8 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("width", "hidden"), [(24, 40), (9, 31), (1, 5), (130, 7)])
def test_layers_that_nothing_is_known_of_get_two_digits(width: int, hidden: int, bias: bool, tmp_path: Path) -> None:
    module, x = Layers(width, hidden, nn.Tanh(), bias=bias), torch.randn(5, width) * 3
    export(module, x, tmp_path / "model.onnx", "int8")
    (found,) = run(tmp_path / "model.onnx", x.numpy())
    hidden_state = np.tanh(two_digits(x.numpy(), module.first), dtype=np.float32)
    assert_close(found, two_digits(hidden_state, module.second), 2e-4)  # a last digit may go either way
    with torch.no_grad():
        assert_close(found, module(x).numpy(), 0.05)


@pytest.mark.parametrize(("activation", "shift"), [(nn.ReLU(), 0.0), (nn.GELU(), 0.17), (nn.Tanh(), None)])
def test_one_digit_uses_what_is_known_of_the_sign(activation: nn.Module, shift: float | None, tmp_path: Path) -> None:
    module, x = Layers(24, 40, activation), torch.randn(5, 24)
    activations = seen(module, x)
    export(module, x, tmp_path / "model.onnx", "int8", activations)
    (found,) = run(tmp_path / "model.onnx", x.numpy())
    hidden = activation(torch.from_numpy(one_digit(x.numpy(), module.first))).numpy()
    assert_close(found, one_digit(hidden, module.second, shift))


def test_outliers_get_a_second_digit(tmp_path: Path) -> None:
    module, x = Layers(64, 40, nn.ReLU()), torch.randn(50, 64)
    x[:, 7] *= 50
    activations = seen(module, x)
    assert (activations.rounding_error(["first.weight"], None) or 0) > 0.02
    assert (activations.rounding_error(["second.weight"], 0.0) or 1) < 0.02
    export(module, x, tmp_path / "model.onnx", "int8", activations)
    (found,) = run(tmp_path / "model.onnx", x.numpy())
    hidden = np.maximum(two_digits(x.numpy(), module.first), 0)
    assert_close(found, one_digit(hidden, module.second, 0.0))


@pytest.mark.parametrize("known", [True, False])
def test_rows_do_not_depend_on_their_neighbours(known: bool, tmp_path: Path) -> None:
    module, x = Layers(64, 48, nn.GELU()), torch.randn(33, 64)
    activations = seen(module, x) if known else None
    export(module, x, tmp_path / "model.onnx", "int8", activations)
    loud = x.numpy() * np.where(np.arange(33) % 2, 1, 1000).astype(np.float32)[:, None]
    (together,) = run(tmp_path / "model.onnx", loud)
    for row in (1, 5, 31):
        np.testing.assert_array_equal(together[row : row + 1], run(tmp_path / "model.onnx", loud[row : row + 1])[0])


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 40])
def test_the_largest_values_do_not_saturate(known: bool, rows: int, tmp_path: Path) -> None:
    """Every input and weight at the end of its range and of one sign: where AVX2 would saturate."""
    width = 256
    module = Layers(width, width, nn.ReLU(), bias=False)
    for layer in (module.first, module.second):
        layer.weight = nn.Parameter(torch.full((width, width), 0.01))
    x = torch.full((rows, width), 2.0)
    activations = seen(module, x) if known else None
    if known:  # a row of one value loses nothing by rounding, whatever the statistics say
        assert activations is not None
        activations.statistics = {name: InputStatistics(1, 1.0, 1.0, 1.0, 1.0) for name in activations.statistics}
    export(module, x, tmp_path / "model.onnx", "int8", activations)
    (found,) = run(tmp_path / "model.onnx", x.numpy())
    np.testing.assert_allclose(found, 2.0 * (0.01 * width) ** 2, rtol=1e-5)
    (found,) = run(tmp_path / "model.onnx", -x.numpy())
    np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_rows_and_weights_of_zeros(precision: Precision, tmp_path: Path) -> None:
    module = Layers(32, 32, nn.ReLU())
    with torch.no_grad():
        module.first.weight[3:9] = 0
        module.second.weight.zero_()
    export(module, torch.zeros(2, 32), tmp_path / "model.onnx", precision)
    (found,) = run(tmp_path / "model.onnx", np.zeros((3, 32), np.float32))
    np.testing.assert_allclose(found, np.tile(bias_of(module.second), (3, 1)), rtol=0, atol=1e-6)


def test_channels_are_rounded_by_their_own_scales() -> None:
    weight = torch.randn(7, 20) * torch.logspace(-3, 3, 7)[:, None]
    values, scales = quantize_channels(weight, 127)
    assert values.dtype == torch.int8
    assert torch.equal(values.abs().amax(1), torch.full((7,), 127, dtype=torch.int8))
    errors = (values * scales[:, None] - weight).abs().amax(1)
    assert bool((errors <= scales / 2 * 1.001).all())


# --- int4 ------------------------------------------------------------------------------------------------------------


def dequantize(codes: Tensor, scales: Tensor, width: int) -> Tensor:
    low, high = codes & 15, codes >> 4
    values = torch.stack([low, high], dim=-1).flatten(2).float() - 8  # (N, blocks, BLOCK)
    return (values * scales[..., None]).flatten(1)[:, :width]


@pytest.mark.parametrize(("width", "outputs"), [(64, 5), (32, 1), (33, 3), (70, 4), (5, 2)])
def test_blocks_are_rounded_by_their_own_scales(width: int, outputs: int) -> None:
    weight = torch.randn(outputs, width)
    codes, scales = quantize_blocks(weight)
    blocks = -(-width // BLOCK)
    assert (tuple(codes.shape), tuple(scales.shape)) == ((outputs, blocks, BLOCK // 2), (outputs, blocks))
    assert torch.equal(scales.half().float(), scales)
    found = dequantize(codes, scales, width)
    steps = scales.abs().repeat_interleave(BLOCK, dim=1)[:, :width]
    assert bool(((found - weight).abs() <= steps * 1.01).all())  # half a step; a whole one opposite of the extreme
    assert (found - weight).square().mean() < 0.02 * weight.square().mean()
    extremes = weight.abs().argmax(1)
    rows = torch.arange(outputs)
    torch.testing.assert_close(found[rows, extremes], weight[rows, extremes], rtol=2e-3, atol=0)


def test_scales_that_fp16_cannot_hold_stay_float32() -> None:
    weight = torch.randn(3, 64) * 1e-6
    codes, scales = quantize_blocks(weight)
    assert not torch.equal(scales.half().float(), scales)
    assert (dequantize(codes, scales, 64) - weight).square().mean() < 0.02 * weight.square().mean()


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize(("width", "hidden"), [(64, 96), (48, 77), (9, 31), (130, 7)])
def test_four_bit_layers_multiply_with_the_rounded_weights(rows: int, width: int, hidden: int, tmp_path: Path) -> None:
    module, x = Layers(width, hidden, nn.ReLU()), torch.randn(rows, width)
    export(module, x, tmp_path / "model.onnx", "int4")
    (found,) = run(tmp_path / "model.onnx", x.numpy())
    operators = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert operators >= {"MatMulNBits"}
    assert not operators & {"Gemm", "MatMul"}
    with torch.no_grad():
        for layer in (module.first, module.second):
            layer.weight.copy_(dequantize(*quantize_blocks(layer.weight), layer.in_features))
        assert_close(found, module(x).numpy(), 0.03)  # ONNX Runtime rounds the input to 8 bits by itself


# --- heads and embeddings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_tied_embeddings_are_stored_once(precision: Precision, tmp_path: Path) -> None:
    module, path = Tied(301, 48), tmp_path / "model.onnx"
    ids = torch.randint(0, 301, (13,))
    export(module, ids, path, precision)
    large = [x for x in onnx.load(path).graph.initializer if np.prod(x.dims) >= 301 * 48]
    assert [(x.data_type, list(x.dims)) for x in large] == [(onnx.TensorProto.INT8, [48, 301])]
    assert path.stat().st_size < 301 * 48 + 8000
    logits, embedded = run(path, ids.numpy())
    values, scales = quantize_channels(module.embed.weight.detach(), 127)
    expected = (values * scales[:, None]).numpy()[ids.numpy()]
    np.testing.assert_allclose(embedded, expected, rtol=1e-6)
    head = nn.Linear(48, 301, bias=False)
    head.weight = nn.Parameter(module.embed.weight.detach())
    assert_close(logits, two_digits(np.tanh(expected), head))


def test_the_head_of_four_bit_models_has_eight(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(32, 32), nn.Linear(32, 50)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.inner(x))) * 2

    inputs = GraphInputs((torch.randn(3, 32),), ({0: "rows"},), ["x"], [DECODER_IO.logits])
    export_graph(Model(), inputs, tmp_path / "model.onnx", engine="onnxruntime", precision="int4")
    graph = onnx.load(tmp_path / "model.onnx").graph
    large = {x.name: x.data_type for x in graph.initializer if len(x.dims) > 1}
    assert large == {
        "head.weight.values": onnx.TensorProto.INT8,
        "inner.weight.codes": onnx.TensorProto.UINT8,
        "inner.weight.scales": onnx.TensorProto.FLOAT16,
    }


def test_inputs_that_two_layers_share_are_rounded_once(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(16, 24), nn.Linear(16, 24)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(x)
            return torch.sigmoid(self.gate(x)) * self.up(x)

    module, x = Model(), torch.randn(3, 16)
    inputs = GraphInputs((x,), ({0: "rows"},), ["x"], ["y"])
    export_graph(module, inputs, tmp_path / "model.onnx", engine="onnxruntime", precision="int8")
    nodes = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert nodes.count("QuantizeLinear") == 1
    assert nodes.count("MatMulIntegerToFloat") == 2
    with torch.no_grad():
        assert_close(run(tmp_path / "model.onnx", x.numpy())[0], module(x).numpy(), 0.02)


# --- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shift", "make"), [(None, torch.randn), (0.0, torch.rand), (0.17, torch.randn)])
def test_the_rounding_error_is_what_rounding_does(shift: float | None, make: Any) -> None:
    x = make(400, 300)
    x = nn.functional.gelu(x) if shift == 0.17 else x
    statistics = InputStatistics()
    statistics.add(x[:100].reshape(10, 10, 300))
    statistics.add(x[100:])
    scale = x.abs().amax(1, keepdim=True) / STEPS if shift is None else (x.amax(1, keepdim=True) + shift) / (2 * STEPS)
    moved = x + (shift or 0)
    error = ((moved / scale).round() * scale - moved).norm() / x.norm()
    assert statistics.rounding_error(shift) == pytest.approx(float(error), rel=0.05)


def test_what_was_not_seen_has_no_error() -> None:
    module = Layers(8, 8, nn.ReLU())
    with observe(module) as activations:
        module.first(torch.randn(2, 8))
    assert activations.rounding_error(["first.weight"], None) is not None
    assert activations.rounding_error(["first.weight", "second.weight"], None) is None
    assert activations.rounding_error(["third.weight"], None) is None
    assert activations.rounding_error([], None) is None
    module(torch.randn(2, 8))
    assert activations.statistics["second.weight"].rows == 0, "nothing is recorded behind the block"
