"""What a graph for a GPU says of its logits, executed by ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from blipstream_export.lowering.logits import reduce_logits

from blipstream.contract import DECODER_IO
from blipstream.decoding.logits import Scores

WIDTH = 50_272


def run(logits: Scores) -> tuple[list[int], Scores]:
    given = ir.Value(name="given", shape=ir.Shape(["batch", WIDTH]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Identity", [given])
    output = node.outputs[0]
    output.name, output.shape, output.type = DECODER_IO.logits, given.shape, given.type
    graph = ir.Graph([given], [output], nodes=[node], opset_imports={"": 21})
    model = ir.Model(graph, ir_version=10)
    reduce_logits(model)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    argmax, sums = session.run([DECODER_IO.argmax, DECODER_IO.sums], {"given": logits})
    assert argmax.dtype == np.int64
    return argmax.tolist(), sums


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_argmax_and_sums() -> None:
    logits = np.random.default_rng(0).normal(0, 4, (5, WIDTH)).astype(np.float32)
    logits[1, [77, 50_000, WIDTH - 1]] = 99.0  # of equal ones, the first
    logits[2] = -3.0
    logits[3, 5:] = -np.inf
    logits[4, WIDTH - 1] = 99.0
    argmax, sums = run(logits)
    assert argmax == logits.argmax(axis=1).tolist()
    assert argmax[1:3] == [77, 0]
    np.testing.assert_allclose(sums, logits.sum(axis=1, dtype=np.float64), rtol=1e-4)


@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_has_a_sum_that_is_not_and_concerns_no_other_row(fault: float) -> None:
    logits = np.random.default_rng(1).normal(0, 4, (3, WIDTH)).astype(np.float32)
    logits[1, 4711] = fault
    argmax, sums = run(logits)
    assert np.isfinite(sums).tolist() == [True, False, True]
    assert [argmax[0], argmax[2]] == logits[[0, 2]].argmax(axis=1).tolist()
