"""``blipstream build --engine tensorrt`` from a checkpoint to a bundle, on a simulated GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from blipstream_export.build import BuildOptions, build
from blipstream_export.graphs import export_graph
from blipstream_export.plans.options import PlanOptions
from blipstream_export.reference import Reading, Reference, SampleText
from typer.testing import CliRunner

from blipstream.cli import app
from blipstream.contract import ModelSpec
from blipstream.engines import open_engine
from blipstream.engines.platform import check_platform
from blipstream.errors import BundleError, EngineError
from blipstream.manifest import Manifest, PlanSection
from blipstream.repository import write_models
from tests.export.language_models import CAPACITY, make_model, module_of
from tests.simulated import simulated_gpu
from tests.support.checkpoints import TinySizes, save_blip2_opt
from tests.support.instructblip import save_instructblip

text_format = pytest.importorskip("google.protobuf.text_format")
model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")

RELU = '<ir_version: 12, opset_import: ["" : 24]> g (float[batch, 3] x) => (float[batch, 3] y) { y = Relu(x) }'
PLANS = {"vision_encoder/1/model.plan", "qformer/1/model.plan", "blip2/1/decoder.plan"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_blip2_opt(tmp_path_factory.mktemp("random") / "checkpoint")


@pytest.fixture(scope="module")
def fusable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose Q-Former has heads that the fused kernels know."""
    sizes = TinySizes(qformer_hidden=32, qformer_heads=2)
    return save_blip2_opt(tmp_path_factory.mktemp("fusable") / "checkpoint", sizes=sizes)


def build_plans(checkpoint: Path, output: Path, plans: PlanOptions | None = None, **options: Any) -> Manifest:
    options = {"max_sequences": 3, "max_batch": 2, **options}
    return build(str(checkpoint), output, BuildOptions(engine="tensorrt", plans=plans, **options)).manifest


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    with simulated_gpu():
        build_plans(checkpoint, checkpoint.parent / "bundle")
    return checkpoint.parent / "bundle"


def test_a_bundle_of_plans(bundle: Path) -> None:
    """It has passed the parity report of fp32: every greedy token is the checkpoint's."""
    manifest = Manifest.load(bundle)
    files = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    assert {name for name in files if name.endswith((".plan", ".onnx", ".data"))} == PLANS
    assert manifest.plans is not None
    assert set(manifest.plans.seconds) == PLANS
    assert (manifest.plans.gpu, manifest.plans.compute_capability) == ("Simulated GPU", "9.0")
    assert (manifest.engine, manifest.max_batch, manifest.plans.hardware) == ("tensorrt", 2, "none")
    assert {path.name for path in bundle.parent.iterdir()} == {"bundle", "checkpoint"}  # no graph is left


def test_the_container_runs_the_image_in_its_own_backend(bundle: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(bundle)
    write_models(tmp_path, manifest, embedded=True)
    specs = {spec.name: spec for spec in manifest.models}
    for name in ("vision_encoder", "qformer"):
        config = read_config(bundle / name / "config.pbtxt")
        assert (config.backend, config.default_model_filename) == ("tensorrt", "model.plan")
        assert list(config.instance_group[0].profile) == ["0", "1"]
        assert config.max_batch_size == 2
        assert tensors(config) == tensors_of(specs[name], manifest)
        embedded = read_config(tmp_path / name / "config.pbtxt")
        assert embedded.backend == "python"
        assert tensors(embedded) == tensors(config)


def read_config(path: Path) -> Any:
    return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


def tensors(config: Any) -> list[tuple[str, tuple[int, ...]]]:
    return [(tensor.name, tuple(tensor.dims)) for tensor in (*config.input, *config.output)]


def tensors_of(spec: ModelSpec, manifest: Manifest) -> list[tuple[str, tuple[int, ...]]]:
    return [(tensor.name, manifest.shape(tensor)) for tensor in (*spec.inputs, *spec.outputs)]


@pytest.mark.slow
@pytest.mark.parametrize("language", ["t5"])
def test_instructions_and_an_encoder(language: str, tmp_path: Path) -> None:
    checkpoint = save_instructblip(tmp_path / "checkpoint", language, seed=1)
    manifest = build_plans(checkpoint, tmp_path / "bundle", precision="fp32")
    assert manifest.plans is not None
    assert ("blip2/1/encoder.plan" in manifest.plans.seconds) == (language == "t5")


def test_half_precision_passes_its_report(checkpoint: Path, tmp_path: Path) -> None:
    result = build(
        str(checkpoint),
        tmp_path / "bundle",
        BuildOptions(engine="tensorrt", precision="fp16", max_sequences=3, plans=PlanOptions(hardware="ampere+")),
    )
    assert {stage.precision for stage in result.parity.stages} == {"fp32", "fp16"}
    assert result.manifest.plans is not None
    assert result.manifest.plans.hardware == "ampere+"


def test_timings_are_kept_and_a_damaged_file_is_replaced(tmp_path: Path) -> None:
    from blipstream_export.plans.builder import PlanBuilder
    from blipstream_export.plans.profiles import image_profiles

    file, graph = tmp_path / "cache" / "timings", tmp_path / "graph.onnx"
    onnx.save(onnx.parser.parse_model(RELU), graph)
    for content in (b"timed ", b"timed timed ", b"timed "):
        PlanBuilder(PlanOptions(timing_cache=file)).build(graph, tmp_path / "graph.plan", image_profiles(4))
        assert file.read_bytes() == content
        if content.count(b"timed") == 2:
            file.write_bytes(b"damaged")
    assert [path.name for path in file.parent.iterdir()] == ["timings"]


def test_what_tensorrt_does_not_read(tmp_path: Path) -> None:
    from blipstream_export.plans.builder import PlanBuilder

    graph = tmp_path / "graph.onnx"
    model = onnx.parser.parse_model(
        '<ir_version: 12, opset_import: ["" : 24]> g (int64[3] x) => (int64[3] y) { y = Clip(x) }'
    )
    onnx.save(model, graph)
    with pytest.raises(EngineError, match=r"TensorRT 11\.4\S* does not read graph\.onnx: .*Clip is not read for INT64"):
        PlanBuilder(PlanOptions()).build(graph, tmp_path / "graph.plan", [])


def test_the_command_line(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["--engine", "tensorrt", "--max-batch", "1", "--max-sequences", "2", "--no-plugins", "--debug-parity"]
    done = CliRunner().invoke(app, ["build", str(checkpoint), "-o", str(tmp_path / "bundle"), *arguments])
    assert done.exit_code == 0, done.output
    assert "qformer/1/model.plan: farthest from ONNX Runtime, of" in done.output
    layers = json.loads((tmp_path / "bundle" / "layers.json").read_text())
    assert set(layers) == PLANS
    assert all(len(rows) > 10 and all(row["relative_error"] == 0 for row in rows) for rows in layers.values())
    manifest = Manifest.load(tmp_path / "bundle")
    assert manifest.plans is not None
    assert not manifest.plans.plugins
    config = read_config(tmp_path / "bundle" / "qformer" / "config.pbtxt")
    assert list(config.instance_group[0].profile) == ["0"]


@pytest.mark.parametrize("language", ["opt", "t5"])
def test_a_tensor_that_departs_is_named(language: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorrt
    from blipstream_export.plans.builder import PlanBuilder
    from blipstream_export.plans.layers import compare_layers
    from blipstream_export.plans.profiles import ServedShapes
    from blipstream_export.plans.samples import GraphSamples

    model, module = make_model(language), module_of(language)
    sizes = module.decoder_section(model.config, max_sequences=3, max_tokens=CAPACITY)
    *_, graph = module.graphs(model, sizes)
    path = tmp_path / graph.file
    with torch.no_grad():
        fixed = {"capacity": sizes.max_tokens, "prompt_capacity": sizes.max_prompt_tokens}
        export_graph(graph.module, graph.inputs.fixed(fixed), path, engine="tensorrt")
    rng = np.random.default_rng(0)
    soft_tokens = rng.standard_normal((4, sizes.hidden_size)).astype(np.float32)
    text = SampleText((0,), (0,), "", (5, 6), (7, 8, 9), np.zeros((3, 4), np.float32))
    reference = Reference([], np.zeros(0), np.zeros(0), [Reading(0, None, soft_tokens)], [text, text])
    feed = GraphSamples(reference, sizes, None, 1).feed("decoder", path)
    broken: list[str] = []
    run = tensorrt.IExecutionContext._run

    def wrong(context: Any, arrays: dict[str, Any]) -> None:
        run(context, arrays)
        products = [name for name in arrays if name.startswith(("matmul", "linear"))]
        broken.append(products[1])
        arrays[products[1]] += 1.0

    monkeypatch.setattr(tensorrt.IExecutionContext, "_run", wrong)
    profiles = ServedShapes(1, 4, 1, None, sizes).decoder()
    differences = compare_layers(path, PlanBuilder(PlanOptions()), profiles, feed)
    assert [row.tensor for row in differences if row.relative_error] == broken
    assert {path.name for path in tmp_path.iterdir()} == {"cache", graph.file}


@pytest.mark.parametrize("plugins", [True, False])
def test_the_q_former_has_blipstreams_kernel(plugins: bool, fusable: Path, tmp_path: Path) -> None:
    from tensorrt.plugin import REGISTERED

    manifest = build_plans(fusable, tmp_path / "bundle", PlanOptions(plugins=plugins))
    assert manifest.plans is not None
    assert manifest.plans.plugins == plugins
    assert ("blipstream::cross_attention" in REGISTERED) == plugins


@pytest.mark.parametrize(
    ("options", "flags", "hardware"),
    [
        (PlanOptions(), [], "NONE"),
        (PlanOptions(version_compatible=True), ["VERSION_COMPATIBLE"], "NONE"),
        (PlanOptions(hardware="same"), [], "SAME_COMPUTE_CAPABILITY"),
        (PlanOptions(hardware="ampere+"), [], "AMPERE_PLUS"),
    ],
)
def test_what_a_plan_is_compatible_with(options: PlanOptions, flags: list[str], hardware: str, tmp_path: Path) -> None:
    from blipstream_export.plans.builder import PlanBuilder
    from blipstream_export.plans.profiles import image_profiles

    graph, plan = tmp_path / "graph.onnx", tmp_path / "graph.plan"
    onnx.save(onnx.parser.parse_model(RELU), graph)
    builder = PlanBuilder(options)
    builder.build(graph, plan, image_profiles(4))
    made = json.loads(plan.read_bytes())
    assert (made["flags"], made["hardware"]) == (flags, hardware)  # TF32 is never among them
    section = builder.section({"graph.plan": 1.0}, plugins=False)
    assert (section.version_compatible, section.hardware) == (options.version_compatible, options.hardware)
    assert builder.gpu.architecture == (80 if options.hardware == "ampere+" else 90)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_without_a_gpu_nothing_is_begun(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMULATED_GPUS", "0")
    with pytest.raises(EngineError, match=r"needs an NVIDIA GPU and its driver, but .*no CUDA-capable device"):
        build_plans(checkpoint, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_options_of_tensorrt_for_another_engine(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="options of TensorRT were given, and the engine is onnxruntime"):
        BuildOptions(plans=PlanOptions(plugins=False))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"debug_parity": True}, "options of TensorRT were given, and the engine is onnxruntime"),
        ({"debug_parity": True, "engine": "tensorrt", "precision": "bf16"}, "in fp16, fp32, .* 'bf16' has bf16"),
        ({"max_batch": 0}, "max_batch must be at least 1, but it is 0"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], text: str) -> None:
    with pytest.raises(BundleError, match=text):
        BuildOptions(**options)


def test_a_bundle_of_another_gpu(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    assert manifest.plans is not None
    plans = manifest.plans.model_copy(update={"gpu": "NVIDIA A10", "compute_capability": "8.6"})
    moved = manifest.model_copy(update={"plans": plans})
    folder = bundle / "qformer" / "1"
    with pytest.raises(EngineError, match=r"built for NVIDIA A10 .*8\.6\), but this is Simulated GPU .*9\.0\)"):
        open_engine(moved, folder, "model.onnx")
    open_engine(manifest, folder, "model.onnx").close()


H100 = PlanSection(
    tensorrt="11.4.0.106",
    gpu="NVIDIA H100",
    compute_capability="9.0",
    version_compatible=False,
    hardware="none",
    plugins=True,
    seconds={},
)


@pytest.mark.parametrize(
    ("changes", "here"),
    [
        ({}, ("11.4.0.106", "NVIDIA H100", "9.0")),
        ({"version_compatible": True}, ("11.5.1.2", "NVIDIA H100", "9.0")),
        ({"hardware": "same"}, ("11.4.0.106", "NVIDIA H200", "9.0")),
        ({"hardware": "ampere+"}, ("11.4.0.106", "NVIDIA B200", "10.0")),
        ({"hardware": "ampere+"}, ("11.4.0.106", "NVIDIA A10", "8.6")),
    ],
)
def test_where_plans_run(changes: dict[str, Any], here: tuple[str, str, str]) -> None:
    check_platform(H100.model_copy(update=changes), *here)


@pytest.mark.parametrize(
    ("changes", "here", "text"),
    [
        ({}, ("11.5.1.2", "NVIDIA H100", "9.0"), r"TensorRT 11\.4\.0\.106 and need that very version, but .* 11\.5\.1"),
        ({"version_compatible": True}, ("11.3.0.1", "NVIDIA H100", "9.0"), r"need that version or a later one"),
        ({"version_compatible": True}, ("12.0.0.1", "NVIDIA H100", "9.0"), r"but this is TensorRT 12"),
        ({}, ("11.4.0.106", "NVIDIA H200", "9.0"), r"built for NVIDIA H100 .*, but this is NVIDIA H200"),
        ({"hardware": "same"}, ("11.4.0.106", "A10", "8.6"), r"for GPUs of compute capability 9\.0, but this is A10"),
        ({"hardware": "ampere+"}, ("11.4.0.106", "T4", "7.5"), r"for GPUs from Ampere .* on, but this is T4"),
    ],
)
def test_where_plans_do_not_run(changes: dict[str, Any], here: tuple[str, str, str], text: str) -> None:
    with pytest.raises(EngineError, match=text):
        check_platform(H100.model_copy(update=changes), *here)
