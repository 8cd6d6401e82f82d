"""On a real GPU, with the engines that are installed; the others are skipped by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from blipstream_export.build import BuildOptions, build
from blipstream_export.graphs import export_graph
from blipstream_export.parity import COMPUTED_THRESHOLDS, Thresholds
from blipstream_export.plans.options import PlanOptions
from blipstream_export.plans.profiles import ServedShapes

from blipstream.engines import RowDecoder, create_engine, load_decoder
from blipstream.manifest import EngineName, Manifest
from blipstream.triton.server import TritonServer
from tests.export.language_models import CAPACITY, decode_along, make_model, module_of
from tests.server.faithful import Ask, Reference, ask_concurrently, assert_equal
from tests.support.checkpoints import PROMPTS, TinySizes, make_images, save_blip2
from tests.support.instructblip import save_instructblip

pytestmark = pytest.mark.gpu

TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.05}
ROUGH = Thresholds(min_cosine=0.97, max_relative_error=0.25, min_agreement=0.5)
"""Of half precision, for random weights: they round worse than trained ones."""
THRESHOLDS = {**COMPUTED_THRESHOLDS, "fp16": ROUGH, "bf16": ROUGH}
FUSABLE = TinySizes(qformer_hidden=32, qformer_heads=2)
"""A Q-Former with heads that the fused kernels know."""


@pytest.fixture(params=["tensorrt", "onnxruntime-cuda"])
def engine(request: pytest.FixtureRequest) -> EngineName:
    name: EngineName = request.param
    if name == "tensorrt" and importlib.util.find_spec("tensorrt") is None:
        pytest.skip("TensorRT is not installed")
    if importlib.util.find_spec("cuda") is None:
        pytest.skip("cuda-bindings is not installed")
    if name == "onnxruntime-cuda":
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("the installed ONNX Runtime has no CUDA")
    return name


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def load(engine: EngineName, language: str, model: Any, folder: Path, dtype: torch.dtype) -> RowDecoder:
    """A language model of three rows on the GPU."""
    module = module_of(language)
    sizes = module.decoder_section(model.config, max_sequences=3, max_tokens=CAPACITY)
    fixed = {"capacity": sizes.max_tokens, "prompt_capacity": sizes.max_prompt_tokens}
    suffix = ".plan" if engine == "tensorrt" else ".onnx"
    for graph in module.graphs(model, sizes):
        path = folder / graph.file
        export_graph(graph.module, graph.inputs.fixed(fixed), path, engine=engine, dtype=dtype)
        if engine == "tensorrt":
            from blipstream_export.plans.builder import PlanBuilder

            shapes = ServedShapes(1, 4, 1, None, sizes)
            profiles = shapes.encoder() if path.stem == "encoder" else shapes.decoder()
            PlanBuilder(PlanOptions()).build(path, path.with_suffix(suffix), profiles)
    return load_decoder(sizes, lambda file: create_engine(engine, (folder / file).with_suffix(suffix)))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("language", ["opt", "llama", "t5"])
def test_language_models_compute_the_logits_of_transformers(
    engine: EngineName, language: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Rows of unequal lengths, prefilled at different times, then stepped together."""
    model = make_model(language)
    decoder = load(engine, language, model, tmp_path, dtype)
    decode_along(decoder, model, TOLERANCES[dtype])
    decoder.close()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", ["blip2-opt", "blip2-t5", "instructblip-llama"])
def test_a_bundle_passes_its_report(engine: EngineName, kind: str, precision: str, tmp_path: Path) -> None:
    image_side, language = kind.split("-")
    save = save_instructblip if image_side == "instructblip" else save_blip2
    checkpoint = save(tmp_path / "checkpoint", language, seed=0)
    options = BuildOptions(engine=engine, precision=precision, max_sequences=3, max_batch=4, thresholds=THRESHOLDS)
    manifest = build(str(checkpoint), tmp_path / "bundle", options).manifest
    assert manifest == Manifest.load(tmp_path / "bundle")


@pytest.mark.parametrize("plugins", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_q_former_with_and_without_the_fused_kernel(precision: str, plugins: bool, tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt") is None:
        pytest.skip("TensorRT is not installed")
    checkpoint = save_blip2(tmp_path / "checkpoint", "opt", seed=0, sizes=FUSABLE)
    plans = PlanOptions(plugins=plugins)
    options = BuildOptions(engine="tensorrt", precision=precision, max_sequences=2, plans=plans, thresholds=THRESHOLDS)
    result = build(str(checkpoint), tmp_path / "bundle", options)
    assert result.manifest.plans is not None
    assert result.manifest.plans.plugins == plugins


@pytest.mark.server
@pytest.mark.parametrize("language", ["opt", "t5"])
def test_a_real_server_answers_as_the_checkpoint_does(engine: EngineName, language: str, tmp_path: Path) -> None:
    checkpoint = save_blip2(tmp_path / "checkpoint", language, seed=0)
    build(str(checkpoint), tmp_path / "bundle", BuildOptions(engine=engine, max_sequences=5))
    asks = [Ask(image, PROMPTS[i % len(PROMPTS)]) for i, image in enumerate(make_images(32, seed=1))]
    with TritonServer(tmp_path / "bundle", verbose=True) as server:
        answers = ask_concurrently(server.grpc_url, asks, max_tokens=16)
    assert_equal(Reference(checkpoint), asks, answers, max_new_tokens=16)
