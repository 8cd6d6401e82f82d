"""How weights are stored: in which type, once each, and one at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from blipstream_export import initializers
from blipstream_export.checkpoint import load_model, open_checkpoint
from blipstream_export.deferred import deferred
from blipstream_export.graphs import GraphInputs, export_graph, vision_inputs
from blipstream_export.initializers import Parts, store_as
from blipstream_export.models.vision import VisionEncoder
from blipstream_export.shards import deferred_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blipstream.engines import create_engine
from blipstream.manifest import Precision
from tests.support.checkpoints import save_blip2_opt

HALF = torch.float16
MATRIX = torch.tensor([[1.0, 0.1], [-3.0, 2e-3]])
EXACT = MATRIX.half().float()


@pytest.mark.parametrize(
    ("tensor", "precision", "own_type", "expected"),
    [
        (EXACT, "fp32", HALF, HALF),
        (EXACT, "int8", HALF, HALF),
        (EXACT[0], "fp32", HALF, HALF),
        (MATRIX, "fp32", HALF, torch.float32),  # what a wrapper has computed of it
        (MATRIX.bfloat16().float(), "fp32", torch.bfloat16, torch.bfloat16),
        (MATRIX.bfloat16().float(), "int4", torch.bfloat16, torch.bfloat16),
        (EXACT, "fp32", torch.float32, torch.float32),
        (EXACT, "fp32", None, torch.float32),
        (MATRIX, "fp16", torch.float32, HALF),
        (MATRIX, "bf16", HALF, torch.bfloat16),
        (MATRIX, "int8", torch.float32, HALF),
        (MATRIX[0], "fp16", torch.float32, torch.float32),  # vectors are small
        (MATRIX * 1e5, "fp16", torch.float32, torch.float32),  # beyond the range of fp16
        (MATRIX * 1e5, "bf16", torch.float32, torch.bfloat16),
        (MATRIX * 1e5, "int8", torch.bfloat16, torch.float32),
    ],
)
def test_type_of_a_stored_weight(
    tensor: Tensor, precision: Precision, own_type: torch.dtype | None, expected: torch.dtype
) -> None:
    stored = store_as(tensor, precision, own_type=own_type, may_round=True)
    assert stored.dtype == expected
    assert torch.equal(stored, tensor.to(expected))


def test_what_is_not_of_the_checkpoint_is_never_rounded() -> None:
    for precision in ("fp16", "bf16", "int8", "int4"):
        assert store_as(MATRIX, precision, own_type=None, may_round=False).dtype == torch.float32


def test_parts_are_computed_once_and_let_go() -> None:
    calls = []

    def compute() -> dict[str, Tensor]:
        calls.append(1)
        return {"a": torch.zeros(1), "b": torch.ones(1)}

    parts = Parts(compute)
    assert [float(parts.take(name)) for name in ("a", "b")] == [0, 1]
    assert len(calls) == 1
    assert parts._ready == {}
    parts.take("a")
    assert len(calls) == 2


# --- graphs ----------------------------------------------------------------------------------------------------------


class Lookup(nn.Module):
    """A table, a layer whose weight is stored in half precision, and a table that is the layer's weight as well."""

    def __init__(self, dtype: torch.dtype, *, tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 20)
        self.table.weight = self._defer(torch.randn(64, 20).to(dtype))
        self.weight = self.table.weight if tied else self._defer(torch.randn(64, 20).to(dtype))

    @staticmethod
    def _defer(value: Tensor) -> nn.Parameter:
        lazy = deferred(tuple(value.shape), value.dtype, lambda: value)
        return nn.Parameter(lazy.float(), requires_grad=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.table(ids)
        return nn.functional.linear(rows * 2, self.weight), rows


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_cast_in_the_graph(dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    module, ids, path = Lookup(dtype, tied=tied), torch.tensor([3, 63, 0]), tmp_path / "model.onnx"
    inputs = GraphInputs((ids,), ({0: "rows"},), ["ids"], ["y", "rows"])
    size = export_graph(module, inputs, path, engine="onnxruntime")
    graph = onnx.load(path).graph
    kind = {torch.float16: onnx.TensorProto.FLOAT16, torch.bfloat16: onnx.TensorProto.BFLOAT16}[dtype]
    assert [x.data_type for x in graph.initializer if list(x.dims) == [64, 20]] == [kind] * (1 if tied else 2)
    assert size < (1 if tied else 2) * 64 * 20 * 2 + 2000
    casts = [node.input[0] for node in graph.node if node.op_type == "Cast"]
    gathers = [node.output[0] for node in graph.node if node.op_type == "Gather"]
    assert len(casts) == 2
    assert set(gathers) < set(casts), "a table is cast row by row, and stays small in memory"
    assert {x.type.tensor_type.elem_type for x in graph.output} == {onnx.TensorProto.FLOAT}
    with create_engine("onnxruntime", path, threads=1) as engine:
        found = engine.run({"ids": ids.numpy()})
    with torch.no_grad():
        y, rows = module(ids)
    np.testing.assert_array_equal(found["rows"], rows.numpy())
    np.testing.assert_allclose(found["y"], y.numpy(), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def half_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stored in fp16, as most published checkpoints are."""
    folder = save_blip2_opt(tmp_path_factory.mktemp("checkpoints") / "half")
    tensors = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("external", [True, False])
def test_weights_that_are_read_one_by_one_give_the_same_graph(
    external: bool, random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initializers, "EXTERNAL_DATA_BYTES", 1000 if external else 1 << 30)
    checkpoint = open_checkpoint(str(random_checkpoint))
    files = []
    for name, deferring in (("real", False), ("deferred", True)):
        wrapper = VisionEncoder(load_model(checkpoint, deferred=deferring).vision_model)
        path = tmp_path / name / "model.onnx"
        export_graph(wrapper, vision_inputs(28), path, engine="onnxruntime")
        files.append({path.name: path.read_bytes() for path in sorted(path.parent.iterdir())})
    assert files[0] == files[1]
    assert len(files[0]) == 1 + external


def test_a_checkpoint_in_half_precision_is_not_blown_up(half_checkpoint: Path, tmp_path: Path) -> None:
    tensors = deferred_tensors(half_checkpoint)
    assert {tensor.dtype for tensor in tensors.values()} == {HALF}
    wrapper = VisionEncoder(load_model(open_checkpoint(str(half_checkpoint)), deferred=True).vision_model)
    size = export_graph(wrapper, vision_inputs(28), tmp_path / "model.onnx", engine="onnxruntime")
    stored = sum(2 * tensor.numel() for name, tensor in tensors.items() if name.startswith("vision_model."))
    assert size < 1.05 * stored + 20_000  # the rest is the graph
    types = [x.data_type for x in onnx.load(tmp_path / "model.onnx").graph.initializer if np.prod(x.dims) > 100]
    assert types.count(onnx.TensorProto.FLOAT16) == len(types) - types.count(onnx.TensorProto.FLOAT)
    assert types.count(onnx.TensorProto.FLOAT) <= 1  # the class token with its position: a sum that fp16 cannot hold


MEMORY = """
import resource, sys
from pathlib import Path
from unittest import mock
import torch
from blipstream_export import initializers
from blipstream_export.deferred import deferred
from blipstream_export.graphs import GraphInputs, export_graph
from torch import nn

WIDTH, LAYERS = 1024, int(sys.argv[1])

def read():
    return torch.randn(WIDTH, WIDTH).half()

def layer():
    linear = nn.Linear(WIDTH, WIDTH, device="meta")
    linear.weight = nn.Parameter(deferred((WIDTH, WIDTH), torch.float16, read).float(), requires_grad=False)
    linear.bias = nn.Parameter(torch.zeros(WIDTH))
    return linear

initializers.EXTERNAL_DATA_BYTES = 1000
model = nn.Sequential(*(layer() for _ in range(LAYERS)))
inputs = GraphInputs((torch.zeros(2, WIDTH),), ({0: "rows"},), ["x"], ["y"])
export_graph(model, inputs, Path(sys.argv[2]), engine="onnxruntime", precision=sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8"])
def test_memory_does_not_grow_with_the_model(precision: Precision, tmp_path: Path) -> None:
    """80 layers of 4 MiB (in fp32) cost no more memory than 4, bar the graph."""
    peaks = []
    for layers in (4, 80):
        path = tmp_path / str(layers) / "model.onnx"
        command = [sys.executable, "-c", MEMORY, str(layers), str(path), precision]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]))  # in KiB
        assert path.with_name("model.onnx.data").stat().st_size > layers * 1024 * 1024
    assert peaks[1] - peaks[0] < 100 * 1024, f"{peaks} KiB; the weights are {80 * 4096} KiB in fp32"
