"""Graphs for TensorRT in int8 and fp8: what they are, and what their standard form computes."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from blipstream_export import initializers
from blipstream_export.build import BuildOptions, build
from blipstream_export.graphs import GraphInputs, export_graph, qformer_inputs, vision_inputs
from blipstream_export.lowering.tensorrt_operators import check_importable
from blipstream_export.lowering.tensorrt_reference import write_standard_form
from blipstream_export.models.qformer import QFormer
from blipstream_export.models.vision import VisionEncoder
from blipstream_export.parity import THRESHOLDS, Thresholds
from blipstream_export.plans.calibration import Calibration
from blipstream_export.plans.quantization import QuantizedPrecision, quantize_graph
from blipstream_export.plans.samples import Feed, GraphSamples
from blipstream_export.reference import Reading, Reference, SampleText
from torch import nn

from blipstream.contract import DECODER_FILE, DECODER_IO, ENCODER_FILE, IMAGE_EMBEDS, PIXEL_VALUES
from blipstream.engines import create_engine
from blipstream.errors import EngineError
from tests.export.language_models import CAPACITY, expected_logits, make_model, make_prompts, module_of
from tests.support.checkpoints import make_blip2_opt, save_blip2_opt

needs_modelopt = pytest.mark.skipif(
    importlib.util.find_spec("modelopt") is None,
    reason="nvidia-modelopt is not installed: `pip install -e '.[quantize]'`",
)

DEMO = Path(__file__).parents[2] / "demo" / "checkpoint"
GRAPHS = ["vision_encoder", "qformer", "opt", "llama", "t5 encoder", "t5 decoder"]
TYPES = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}
LIMITS = {"int8": 0.06, "fp8": 0.15}
"""Of the error relative to fp32: int8 errs by 0.6 to 4.5 % here, and fp8, which has three digits for each number, by
1.6 to 11.5 %."""


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Makes each case once."""
    return functools.cache(lambda name: make_case(name, tmp_path_factory.mktemp("graphs")))


@dataclass(frozen=True)
class Case:
    """A graph in fp16 and in fp32, and what it reads."""

    half: Path
    exact: Path
    feeds: list[Feed]


def export(module: nn.Module, inputs: GraphInputs, folder: Path, name: str) -> tuple[Path, Path]:
    paths = folder / f"{name}.fp16.onnx", folder / f"{name}.fp32.onnx"
    for path, dtype in zip(paths, (torch.float16, torch.float32), strict=True):
        export_graph(module, inputs, path, engine="tensorrt", dtype=dtype)
    return paths


def tamed(model: Any) -> Any:
    """With smaller matrices: a network that is mostly noise enlarges whatever rounding loses."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            module.weight.mul_(0.3)
    return model


def make_case(name: str, folder: Path) -> Case:
    rng = np.random.default_rng(0)
    if name in ("vision_encoder", "qformer"):
        model = tamed(make_blip2_opt())
        if name == "vision_encoder":
            feeds = [{PIXEL_VALUES.name: rng.standard_normal((2, 3, 28, 28)).astype(np.float32)} for _ in range(2)]
            return Case(*export(VisionEncoder(model.vision_model), vision_inputs(28), folder, name), feeds)
        width = model.config.vision_config.hidden_size
        feeds = [{IMAGE_EMBEDS.name: rng.standard_normal((2, 17, width)).astype(np.float32)} for _ in range(2)]
        return Case(*export(QFormer(model), qformer_inputs(17, width), folder, name), feeds)
    language, _, part = name.partition(" ")
    paths, calibration = export_language_model(language, folder)
    file = ENCODER_FILE if part == "encoder" else DECODER_FILE
    for graph, found in paths.items():
        feeds = list(calibration.feeds("decoder", found[0]))
        if graph == file:
            return Case(*found, feeds)
    raise AssertionError(name)


def export_language_model(language: str, folder: Path) -> tuple[dict[str, tuple[Path, Path]], Calibration]:
    """The graphs by their files, the encoder's first; and what they read of three texts, two at once."""
    model, module = tamed(make_model(language)), module_of(language)
    sizes = module.decoder_section(model.config, max_sequences=2, max_tokens=CAPACITY)
    fixed = {"capacity": sizes.max_tokens, "prompt_capacity": sizes.max_prompt_tokens}
    paths = {
        graph.file: export(graph.module, graph.inputs.fixed(fixed), folder, graph.file)
        for graph in module.graphs(model, sizes)
    }
    return paths, Calibration(GraphSamples(make_reference(model), sizes, None, 2))


def make_reference(model: Any) -> Reference:
    prompts = make_prompts(model, [(4, 5), (2, 1), (1, 9)])
    answers = [(7, 8, 9, 10), (11, 12), (13, 14, 15)]
    nothing = np.zeros((1, 1), np.float32)
    readings = [Reading(0, None, prompt.soft_tokens) for prompt in prompts]
    texts = [
        SampleText((0,), (row,), "", prompt.token_ids, answer, nothing)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    return Reference([], nothing, nothing, readings, texts)


def run(graph: Path, feed: Feed) -> dict[str, Any]:
    """The standard form on ONNX Runtime; a cache has the graph's type."""
    standard = write_standard_form(graph, graph.with_suffix(".standard"))
    with create_engine("onnxruntime", standard, threads=1) as engine:
        types = {info.name: info.dtype for info in engine.inputs}
        return engine.run({name: np.asarray(feed[name], types[name]) for name in types})


def error(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Of the first output, or of all where a cache is what a graph is for: relative to its length."""
    names = [DECODER_IO.logits] if DECODER_IO.logits in expected else list(expected)
    difference = sum(np.square(found[name].astype(np.float64) - expected[name]).sum() for name in names)
    return float((difference / sum(np.square(expected[name].astype(np.float64)).sum() for name in names)) ** 0.5)


def products(graph: Path) -> list[ir.Node]:
    return [node for node in ir.load(graph).graph if node.op_type in ("Gemm", "MatMul")]


def read_type(value: ir.Value | None) -> ir.DataType | None:
    """The type of 8 bits behind what a product reads, or its own."""
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "DequantizeLinear":
        value = producer.inputs[0]
    return None if value is None else value.dtype


def scale_one_weight(graph: Path, factor: float) -> Path:
    """A copy of a quantized graph in which the scales of one weight are wrong."""
    model = ir.load(graph)
    (scale, *_) = (value for name, value in model.graph.initializers.items() if name.endswith(".weight.scale"))
    assert scale.const_value is not None
    scale.const_value = ir.Tensor((scale.const_value.numpy() * factor).astype(scale.const_value.numpy().dtype))
    path = graph.with_name("corrupted.onnx")
    ir.save(model, path)
    return path


# --- graphs ----------------------------------------------------------------------------------------------------------


@needs_modelopt
@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("name", GRAPHS)
def test_quantized_graphs(
    name: str, precision: QuantizedPrecision, case_of: Callable[[str], Case], tmp_path: Path
) -> None:
    case = case_of(name)
    before = set(case.half.parent.iterdir())
    output = tmp_path / f"{precision}.onnx"
    layers = quantize_graph(case.half, output, precision, case.feeds)
    assert set(case.half.parent.iterdir()) == before
    onnx.checker.check_model(output, full_check=True)
    check_importable(ir.load(output))

    types = [[read_type(value) for value in node.inputs[:2]] for node in products(output)]
    head = name not in ("vision_encoder", "qformer", "t5 encoder")
    assert types == [[TYPES[precision]] * 2] * len(layers) + [[ir.DataType.FLOAT16] * 2] * head
    assert {layer.form for layer in layers} == {precision}
    stored = ir.load(output).graph.initializers
    assert {stored[f"{layer.weight}.{precision}"].dtype for layer in layers} == {TYPES[precision]}
    assert not {layer.weight for layer in layers} & set(stored)
    saved = sum(stored[f"{layer.weight}.{precision}"].const_value.size for layer in layers)  # type: ignore[union-attr]
    assert output.stat().st_size < case.half.stat().st_size - 0.5 * saved  # names, scales and nodes take the rest

    expected = run(case.exact, case.feeds[-1])
    found, corrupted = (run(path, case.feeds[-1]) for path in (output, scale_one_weight(output, 16)))
    assert error(found, expected) < LIMITS[precision]
    assert error(corrupted, expected) > LIMITS[precision]


@needs_modelopt
def test_fp8_is_what_the_standard_says(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    """The onnx package's evaluator rounds to fp8 by its own code."""
    from onnx.reference import ReferenceEvaluator

    case = case_of("vision_encoder")
    output = tmp_path / "fp8.onnx"
    quantize_graph(case.half, output, "fp8", case.feeds)
    (expected,) = run(output, case.feeds[0]).values()
    evaluator = ReferenceEvaluator(onnx.load(write_standard_form(output, tmp_path / "standard.onnx")))
    (found,) = evaluator.run(None, dict(case.feeds[0]))
    assert error({"": found}, {"": expected}) < 0.02  # a value between two of fp8's goes either way


@needs_modelopt
def test_weights_in_a_file_of_their_own(
    case_of: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of("opt")
    quantize_graph(case.half, tmp_path / "one.onnx", "int8", case.feeds)
    monkeypatch.setattr(initializers, "EXTERNAL_DATA_BYTES", 0)
    case = make_case("opt", tmp_path)
    assert case.half.with_name(f"{case.half.name}.data").is_file()
    quantize_graph(case.half, tmp_path / "two.onnx", "int8", case.feeds)
    assert (tmp_path / "two.onnx.data").stat().st_size < case.half.with_name(f"{case.half.name}.data").stat().st_size
    case.half.with_name(f"{case.half.name}.data").unlink()
    one, two = (run(tmp_path / name, case.feeds[0]) for name in ("one.onnx", "two.onnx"))
    np.testing.assert_array_equal(one[DECODER_IO.logits], two[DECODER_IO.logits])


@needs_modelopt
def test_excluded_products_stay(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    case = case_of("qformer")
    kept = [str(node.name) for node in products(case.half)][2:4]
    layers = quantize_graph(case.half, tmp_path / "int8.onnx", "int8", case.feeds, exclude=kept)
    nodes = products(tmp_path / "int8.onnx")
    assert {node.name for node in nodes if read_type(node.inputs[1]) == ir.DataType.FLOAT16} == set(kept)
    assert len(layers) == len(nodes) - 2
    with pytest.raises(EngineError, match="has no matrix product node_none: expected some of"):
        quantize_graph(case.half, tmp_path / "none.onnx", "int8", case.feeds, exclude=["node_none"])


@needs_modelopt
@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("product", ["Gemm(x, w)", "Gemm<transB=1>(x, w)", "MatMul(x, w)"])
def test_each_output_channel_has_its_scale(product: str, precision: QuantizedPrecision, tmp_path: Path) -> None:
    """Channels of very different size, one of zeros: each errs by its own steps."""
    channels = np.array([1e-3, 0, 1, 30], np.float32)
    weight = np.random.default_rng(0).uniform(-1, 1, (64, 4)).astype(np.float32) * channels
    turned = "transB" in product
    shape = "4, 64" if turned else "64, 4"
    model = onnx.parser.parse_model(
        f'<ir_version: 12, opset_import: ["" : 24]> g (float[N, 64] x) => (float[N, 4] y) '
        f"<float[{shape}] w = {{{', '.join(str(value) for value in (weight.T if turned else weight).ravel())}}}> "
        f"{{ y = {product} }}"
    )
    model.graph.node[0].name = "product"
    onnx.save(model, tmp_path / "graph.onnx")
    feed = {"x": np.eye(64, dtype=np.float32)}
    quantize_graph(tmp_path / "graph.onnx", tmp_path / "out.onnx", precision, [feed])
    found = run(tmp_path / "out.onnx", feed)["y"]
    step = np.abs(weight).max(axis=0) / {"int8": 254, "fp8": 28}[precision]
    assert np.all(np.abs(found - weight) <= step * 1.01)
    assert not found[:, 1].any()
    saturated = run(tmp_path / "out.onnx", {"x": 5 * feed["x"]})["y"]
    np.testing.assert_allclose(saturated, found, rtol=1e-3)  # beyond the samples' range is its end


def test_steps_read_what_the_encoder_and_earlier_steps_left(tmp_path: Path) -> None:
    paths, calibration = export_language_model("t5", tmp_path)
    for _ in calibration.feeds("decoder", paths[ENCODER_FILE][1]):
        pass
    feeds = list(calibration.feeds("decoder", paths[DECODER_FILE][1]))
    assert [len(feed[DECODER_IO.input_ids]) for feed in feeds] == [2] * 4 + [1] * 3
    model = tamed(make_model("t5"))
    texts = make_reference(model).texts
    prompts = make_prompts(model, [(4, 5), (2, 1), (1, 9)])
    for feed, row, text in ((feeds[3], 0, 0), (feeds[1], 1, 1), (feeds[6], 0, 2)):
        step = int(feed[DECODER_IO.position_ids][row, 0])
        expected = expected_logits(model, prompts[text], texts[text].token_ids[:step])
        found = run(paths[DECODER_FILE][1], feed)[DECODER_IO.logits][row]
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5 * np.abs(expected).max())


# --- builds ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_blip2_opt(tmp_path_factory.mktemp("quantized") / "checkpoint")


@needs_modelopt
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp8"])
def test_a_bundle_passes_its_report(precision: str, tmp_path: Path) -> None:
    """Of a trained checkpoint: what random weights compute is mostly noise."""
    result = build(str(DEMO), tmp_path / "bundle", BuildOptions(engine="tensorrt", precision=precision))
    assert {stage.precision for stage in result.parity.stages} == {"fp32", precision}
    assert {layer.form for layer in result.parity.layers} == {precision}
    weights = {layer.weight for layer in result.parity.layers}
    assert {"vision_model.encoder.layers.0.mlp.fc1.weight", "language_projection.weight"} <= weights
    assert not any("embed_tokens" in weight or "lm_head" in weight for weight in weights)
    assert result.manifest.plans is not None
    assert not result.manifest.plans.plugins
    assert {path.name for path in tmp_path.iterdir()} <= {"bundle", "cache"}  # no graph is left


@needs_modelopt
def test_calibration_images_are_what_the_ranges_come_from(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blipstream_export.plans import quantization
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (40, 40), (80 * index, 0, 0)).save(folder / f"{index}.png")
    read: dict[str, int] = {}
    quantize = quantization.quantize_graph

    def spy(graph: Path, output: Path, precision: Any, feeds: Iterator[Feed], exclude: Sequence[str] = ()) -> Any:
        kept = list(feeds)
        for name in kept[0]:
            read[name] = read.get(name, 0) + sum(len(feed[name]) for feed in kept if np.ndim(feed[name]))
        return quantize(graph, output, precision, kept, exclude)

    monkeypatch.setattr(quantization, "quantize_graph", spy)
    options = BuildOptions(
        engine="tensorrt",
        precision="vision_encoder=int8,decoder=int8",
        max_batch=2,
        calibration=folder,
        thresholds=dict.fromkeys(THRESHOLDS, Thresholds(-1, 9, 0)),  # the weights are random
    )
    build(str(checkpoint), tmp_path / "bundle", options)
    assert (read[PIXEL_VALUES.name], read[DECODER_IO.input_ids]) == (3, 3)


def test_without_modelopt(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is missed before any work is done."""
    from blipstream_export import build as module

    monkeypatch.setitem(sys.modules, "modelopt", None)
    monkeypatch.setattr(module, "load_model", lambda *_args, **_options: pytest.fail("work was done"))
    text = r"modelopt\S* is not installed: `pip install -e '\.\[quantize\]'`"
    with pytest.raises(EngineError, match=text):
        build(str(checkpoint), tmp_path / "bundle", BuildOptions(engine="tensorrt", precision="decoder=int8"))
    assert not (tmp_path / "bundle").exists()
