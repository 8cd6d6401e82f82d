"""Where a plan departs from its graph: every tensor of both, compared by polygraphy.

Both get all their tensors as outputs. The plan is built a second time for that, with the same options; since a tensor
that is an output cannot be fused away, what is compared is the plan's arithmetic and not its fusions.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from polygraphy.backend.base import BaseRunner
from polygraphy.comparator import Comparator, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from blipstream.engines import Engine, create_engine
from blipstream_export.lowering.tensorrt_reference import standard_form
from blipstream_export.plans.builder import PlanBuilder
from blipstream_export.plans.profiles import Profile
from blipstream_export.plans.samples import Feed

_COMPARED = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
"""Types that both engines compute in here; ONNX Runtime's CPU does not in bf16."""


@dataclass(frozen=True)
class LayerDifference:
    """One tensor of a graph.

    Attributes:
        tensor: its name.
        operator: that made it.
        relative_error: mean absolute difference over the mean absolute value that ONNX Runtime found.
        max_difference: largest absolute difference.
    """

    tensor: str
    operator: str
    relative_error: float
    max_difference: float


def compare_layers(graph: Path, builder: PlanBuilder, profiles: Sequence[Profile], feed: Feed) -> list[LayerDifference]:
    """Run a graph by TensorRT and by ONNX Runtime on the CPU, and compare tensor by tensor, in the graph's order.

    Args:
        graph: an ONNX graph for TensorRT, which computes in fp32 or fp16.
        builder: builds its plan.
        profiles: of the plan.
        feed: the graph's inputs.

    Raises:
        EngineError: one of the two does not run it.
    """
    # Beside the graph, where its weights are.
    with tempfile.TemporaryDirectory(prefix="layers.", dir=graph.parent) as folder:
        marked, standard = (graph.with_name(f"{Path(folder).name}.{kind}.onnx") for kind in ("marked", "standard"))
        try:
            operators = _write_marked(graph, marked, standard)
            plan = Path(folder, "layers.plan")
            builder.build(marked, plan, profiles)
            with create_engine("tensorrt", plan) as built, create_engine("onnxruntime", standard) as reference:
                found, expected = _run([_Runner("tensorrt", built), _Runner("onnxruntime", reference)], feed)
        finally:
            marked.unlink(missing_ok=True)
            standard.unlink(missing_ok=True)
    return _differences(operators, found, expected)


def dump(differences: Mapping[str, Sequence[LayerDifference]], path: Path) -> None:
    """Write the differences of each graph as JSON."""
    text = json.dumps({graph: [asdict(one) for one in rows] for graph, rows in differences.items()}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


class _Runner(BaseRunner):  # type: ignore[misc]  # polygraphy has no stubs
    """One of Blipstream's engines, as polygraphy runs engines."""

    def __init__(self, name: str, engine: Engine) -> None:
        super().__init__(name=name)
        self._engine = engine

    def get_input_metadata_impl(self) -> Any:
        from polygraphy.common import TensorMetadata

        metadata = TensorMetadata()
        for info in self._engine.inputs:
            shape = [size if isinstance(size, int) else None for size in info.shape]
            metadata.add(info.name, dtype=info.dtype, shape=shape)
        return metadata

    def infer_impl(self, feed_dict: Feed) -> Any:
        started = time.perf_counter()
        outputs = self._engine.run(dict(feed_dict))
        self.inference_time = time.perf_counter() - started
        return outputs


def _write_marked(graph: Path, marked: Path, standard: Path) -> dict[str, str]:
    """Write the graph with all its tensors as outputs, for each of the two engines; return each tensor's operator."""
    model = ir.load(graph)
    operators = {}
    outputs = {value.name for value in model.graph.outputs}
    for node in model.graph:
        value = node.outputs[0]
        if value.dtype not in _COMPARED or node.op_type in ("TensorScatter", "Constant"):
            continue
        operators[str(value.name)] = node.op_type
        if value.name not in outputs:
            model.graph.outputs.append(value)
    ir.save(model, marked)
    standard_form(model)
    ir.save(model, standard)
    return operators


def _run(runners: Sequence[_Runner], feed: Feed) -> tuple[Any, Any]:
    with G_LOGGER.verbosity(G_LOGGER.ERROR):
        results = Comparator.run(list(runners), data_loader=[dict(feed)])
    (found,), (expected,) = (iterations for _, iterations in results.items())
    return found, expected


def _differences(operators: Mapping[str, str], found: Any, expected: Any) -> list[LayerDifference]:
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        compared = SimpleCompareFunc(check_error_stat="mean", rtol=math.inf, atol=math.inf)(found, expected)
    rows = []
    for tensor, operator in operators.items():
        scale = float(abs(expected[tensor]).mean())
        result = compared[tensor]
        error = result.mean_absdiff / scale if scale else result.mean_absdiff
        rows.append(LayerDifference(tensor, operator, float(f"{error:.3g}"), float(f"{result.max_absdiff:.3g}")))
    return rows
