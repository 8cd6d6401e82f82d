"""The ONNX Runtime engine: names, types, errors, runs from several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from blipstream.engines import Engine, create_engine
from blipstream.errors import EngineError


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """``total = left + right``; the two must broadcast."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["left", "right"], ["total"])],
        "add",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", width])
            for name, width in zip(("left", "right"), (3, "W"), strict=True)
        ],
        [helper.make_tensor_value_info("total", TensorProto.FLOAT, ["B", 3])],
    )
    path = tmp_path / "adder" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return create_engine("onnxruntime", path, threads=1)


def test_runs_by_name(engine):
    left, right = np.ones((2, 3), np.float32), np.full((2, 1), 2, np.float32)
    np.testing.assert_array_equal(engine.run({"left": left, "right": right})["total"], np.full((2, 3), 3))


def test_describes_its_tensors(engine):
    assert [(info.name, info.dtype, info.shape) for info in engine.inputs] == [
        ("left", np.float32, ("B", 3)),
        ("right", np.float32, ("B", "W")),
    ]
    assert engine.outputs[0].name == "total"


def test_a_bound_run_reads_and_writes_the_given_memory(engine):
    left, right, total = (np.zeros((2, 3), np.float32) for _ in range(3))
    bound = engine.bind({"left": left, "right": right}, {"total": total})
    for value in (1, 2):
        left[...], right[...] = value, 10 * value
        bound.run()
        np.testing.assert_array_equal(total, np.full((2, 3), 11 * value))


def test_a_bound_run_keeps_its_arrays_alive(engine):
    total = np.zeros((1000, 3), np.float32)
    bound = engine.bind(
        {"left": np.ones((1000, 3), np.float32), "right": np.ones((1000, 3), np.float32)}, {"total": total}
    )
    trash = [np.full((1000, 3), -1, np.float32) for _ in range(50)]  # would reuse the inputs' memory if it were free
    bound.run()
    assert (total == 2).all()
    assert len(trash) == 50


def test_runs_from_several_threads(engine):
    def double(value: int) -> float:
        array = np.full((1, 3), value, np.float32)
        return float(engine.run({"left": array, "right": array})["total"][0, 0])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(double, range(200))) == [2.0 * value for value in range(200)]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"adder/model.onnx: expected the inputs left, right, but was given none"),
        ({"left": np.zeros((1, 3), np.float32)}, r"expected the inputs left, right, but was given left"),
        (
            {"left": np.zeros((1, 3), np.float64), "right": np.zeros((1, 3), np.float32)},
            r"adder/model.onnx: input left must be float32 with 2 dimensions, but it is float64 with 2",
        ),
        (
            {"left": np.zeros((1, 3), np.float32), "right": np.zeros(3, np.float32)},
            r"input right must be float32 with 2 dimensions, but it is float32 with 1",
        ),
        (
            {"left": np.zeros((1, 3), np.float32), "right": np.zeros((1, 2), np.float32)},
            r"adder/model.onnx: the run failed: .*",
        ),
    ],
)
def test_wrong_inputs_are_named(engine, inputs, message):
    with pytest.raises(EngineError, match=message):
        engine.run(inputs)


def test_a_binding_of_strided_memory_is_refused(engine):
    strided = np.zeros((2, 6), np.float32)[:, ::2]
    right, total = np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32)
    with pytest.raises(EngineError, match=r"the array bound to left must be C-contiguous"):
        engine.bind({"left": strided, "right": right}, {"total": total})


def test_a_bound_run_that_fails_names_its_graph(engine):
    arrays = {"left": np.zeros((1, 3), np.float32), "right": np.zeros((1, 2), np.float32)}
    with pytest.raises(EngineError, match=r"adder/model.onnx: the run failed"):
        engine.bind(arrays, {"total": np.zeros((1, 3), np.float32)}).run()


def test_a_closed_engine_says_so(engine):
    with engine:
        pass
    with pytest.raises(EngineError, match=r"adder/model.onnx: the engine is closed"):
        engine.run({"left": np.zeros((1, 3), np.float32), "right": np.zeros((1, 3), np.float32)})


def test_a_missing_file(tmp_path):
    with pytest.raises(EngineError, match=r"there is no ONNX graph at .*nothing.onnx"):
        create_engine("onnxruntime", tmp_path / "nothing.onnx")


def test_a_damaged_file(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"ONNX Runtime cannot load .*model.onnx: "):
        create_engine("onnxruntime", path)


def test_an_unknown_engine(tmp_path):
    with pytest.raises(EngineError, match=r"there is no engine called 'abacus'; this version knows onnxruntime"):
        create_engine("abacus", tmp_path / "model.onnx")
