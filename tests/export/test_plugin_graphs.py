"""The Q-Former's graph with Blipstream's plugins: where they are put, and that they mean what they replace."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from blipstream_export.graphs import export_graph, qformer_inputs
from blipstream_export.lowering import plugins
from blipstream_export.lowering.plugins import MERGE, SPLIT, WHOLE, Gpu, use_plugins
from blipstream_export.lowering.tensorrt_operators import check_importable
from blipstream_export.lowering.tensorrt_reference import standard_form, write_standard_form
from blipstream_export.models.qformer import InstructionQFormer, QFormer
from blipstream_kernels.plan import Plan, Problem, choose, config_of

from blipstream.contract import IMAGE_EMBEDS, INSTRUCTION, SOFT_TOKENS
from blipstream.engines import create_engine
from blipstream.errors import EngineError
from tests.support.checkpoints import TinySizes, make_blip2_opt
from tests.support.instructblip import make_instructblip

TOKENS = 400  # several blocks of the kernels
CONFIG = config_of("absorbed", "fp16")
LARGE, SMALL = Gpu(architecture=90, multiprocessors=132), Gpu(architecture=87, multiprocessors=1)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def export(model: Any, path: Path, dtype: torch.dtype = torch.float32, *, instructed: bool = False) -> Path:
    wrapper = InstructionQFormer(model) if instructed else QFormer(model)
    inputs = qformer_inputs(TOKENS, model.config.vision_config.hidden_size, instructed=instructed)
    export_graph(wrapper, inputs, path, engine="tensorrt", dtype=dtype)
    return path


SIZES = TinySizes(qformer_hidden=32, qformer_heads=2)
"""With heads of 16, which the kernels know."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.no_grad():
        return export(make_blip2_opt(sizes=SIZES), tmp_path_factory.mktemp("graphs") / "qformer.onnx")


@pytest.fixture
def graph(exported: Path, tmp_path: Path) -> Path:
    """The Q-Former's graph in fp32, which a test may change."""
    return Path(shutil.copy(exported, tmp_path / "qformer.onnx"))


def operators(path: Path) -> list[str]:
    return [node.op_type for node in ir.load(path).graph]


def run(path: Path, inputs: dict[str, Any]) -> Any:
    with create_engine("onnxruntime", write_standard_form(path, path.with_suffix(".standard")), threads=1) as engine:
        return engine.run(inputs)[SOFT_TOKENS.name].copy()


def embeds(model: Any, batch: int) -> Any:
    shape = (batch, TOKENS, model.config.vision_config.hidden_size)
    return np.random.default_rng(batch).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float16, 2e-2)])
@pytest.mark.parametrize("splits", [1, 3])
def test_plugins_compute_what_they_replace(
    splits: int, dtype: torch.dtype, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(problem: Problem, multiprocessors: int) -> Plan:
        return choose(problem, multiprocessors, splits=splits) if splits == 1 else Plan("absorbed", CONFIG, splits, 256)

    monkeypatch.setattr(plugins, "choose", plan)
    model = make_blip2_opt(sizes=SIZES)
    path = export(model, tmp_path / "qformer.onnx", dtype)
    inputs = {batch: {IMAGE_EMBEDS.name: embeds(model, batch)} for batch in (1, 3)}
    expected = {batch: run(path, feed) for batch, feed in inputs.items()}
    before = operators(path).count("TRT_Attention")
    assert use_plugins(path, LARGE) == 2
    onnx.checker.check_model(path, full_check=True)
    check_importable(ir.load(path))
    found = operators(path)
    kinds = {WHOLE: 2, SPLIT: 0, MERGE: 0} if splits == 1 else {WHOLE: 0, SPLIT: 2, MERGE: 2}
    assert {kind: found.count(kind) for kind in kinds} == kinds
    assert found.count("TRT_Attention") == before - 2
    for batch, feed in inputs.items():
        largest = np.abs(expected[batch]).max()
        np.testing.assert_allclose(run(path, feed), expected[batch], rtol=0, atol=tolerance * largest)


def test_a_q_former_that_reads_instructions(tmp_path: Path) -> None:
    model = make_instructblip("opt", seed=1, sizes=SIZES)
    path = export(model, tmp_path / "qformer.onnx", instructed=True)
    ids, mask = (tensor.name for tensor in INSTRUCTION)
    feed = {
        IMAGE_EMBEDS.name: embeds(model, 2),
        ids: np.array([[3, 4, 5], [6, 7, 0]]),
        mask: np.array([[1, 1, 1], [1, 1, 0]]),
    }
    expected = run(path, feed)
    assert use_plugins(path, LARGE) == 2
    np.testing.assert_allclose(run(path, feed), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_weights_that_are_stored_in_half_precision(tmp_path: Path) -> None:
    """A graph in fp32 keeps them so, and casts them."""
    model = make_blip2_opt(sizes=SIZES).half()
    path = export(model, tmp_path / "qformer.onnx")
    feed = {IMAGE_EMBEDS.name: embeds(model, 2)}
    expected = run(path, feed)
    assert use_plugins(path, LARGE) == 2
    check_importable(ir.load(path))
    np.testing.assert_allclose(run(path, feed), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_a_plugins_attributes_are_those_that_it_declares(graph: Path) -> None:
    use_plugins(graph, LARGE)
    split = next(node for node in ir.load(graph).graph if node.op_type == SPLIT)
    found = {name: attribute.value for name, attribute in split.attributes.items()}
    assert found.pop("scale") == pytest.approx(16**-0.5)
    assert found.pop("splits") == choose(Problem(1, 2, 6, TOKENS, 36, 16, "fp32"), LARGE.multiprocessors).splits
    assert found == {
        "heads": 2,
        "queries": 6,
        "tokens": TOKENS,
        "architecture": 90,
        "plugin_namespace": "blipstream",
        "plugin_version": "1",
        "aot": 1,
    }
    assert [value.shape for value in split.inputs[2:] if value] == [[32, 36], [32, 36]]


def test_heads_that_the_kernels_do_not_know_are_left_alone(tmp_path: Path) -> None:
    path = export(make_blip2_opt(), tmp_path / "qformer.onnx")
    before = path.read_bytes()
    assert use_plugins(path, LARGE) == 0
    assert path.read_bytes() == before


def test_a_plugin_without_a_written_meaning(graph: Path) -> None:
    use_plugins(graph, SMALL)
    model = ir.load(graph)
    next(node for node in model.graph if node.op_type == WHOLE).op_type = "another"
    with pytest.raises(EngineError, match="there is no plugin another"):
        check_importable(model)
    with pytest.raises(EngineError, match="the meaning of the plugin another is not written down"):
        standard_form(model)
