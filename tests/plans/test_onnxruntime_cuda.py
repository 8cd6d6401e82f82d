"""ONNX Runtime on a GPU, simulated: the graphs, caches and bindings that a GPU gets, with the CPU's kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from blipstream_export.build import BuildOptions, build
from blipstream_export.graphs import export_graph

from blipstream.engines import create_engine, load_decoder, onnxruntime
from blipstream.errors import EngineError
from blipstream.manifest import DecoderSection
from tests.export.language_models import CAPACITY, decode_along, make_model, module_of
from tests.support.checkpoints import save_blip2_opt

NAME = "onnxruntime-cuda"


@pytest.fixture
def cuda_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where CUDA's provider is named, the CPU's runs; the memory of the simulated device is the host's."""
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: providers)
    monkeypatch.setattr(onnxruntime, "_DEVICE", "cpu")
    monkeypatch.setattr(onnxruntime.OnnxRuntimeCudaEngine, "_providers", lambda _: providers[1:])


@pytest.mark.usefixtures("cuda_provider")
@pytest.mark.parametrize(
    ("language", "dtype", "tolerance"),
    [
        ("opt", torch.float32, 5e-5),
        ("llama", torch.float32, 5e-5),
        ("t5", torch.float32, 5e-5),
        ("llama", torch.float16, 0.05),
        ("t5", torch.float16, 0.05),
    ],
)
def test_language_models(language: str, dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    model: Any = make_model(language)
    module = module_of(language)
    sizes: DecoderSection = module.decoder_section(model.config, max_sequences=3, max_tokens=CAPACITY)
    fixed = {"capacity": sizes.max_tokens, "prompt_capacity": sizes.max_prompt_tokens}
    with torch.no_grad():
        for graph in module.graphs(model, sizes):
            export_graph(graph.module, graph.inputs.fixed(fixed), tmp_path / graph.file, engine=NAME, dtype=dtype)
        decoder = load_decoder(sizes, lambda file: create_engine(NAME, tmp_path / file, threads=1))
        decode_along(decoder, model, tolerance)
    decoder.close()


@pytest.mark.usefixtures("cuda_provider")
def test_a_bundle_passes_its_report(tmp_path: Path) -> None:
    checkpoint = save_blip2_opt(tmp_path / "checkpoint")
    result = build(str(checkpoint), tmp_path / "bundle", BuildOptions(engine=NAME, max_sequences=3))
    assert result.manifest.engine == NAME
    assert all(text.equal for text in result.parity.texts)


def test_an_onnxruntime_without_cuda(tmp_path: Path) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("the installed ONNX Runtime has CUDA")
    with pytest.raises(EngineError, match=r"CUDAExecutionProvider is needed, .*: `pip install -e '\.\[cuda\]'`"):
        build(str(save_blip2_opt(tmp_path / "checkpoint")), tmp_path / "bundle", BuildOptions(engine=NAME))
    assert not (tmp_path / "bundle").exists()


@pytest.mark.usefixtures("cuda_provider")
def test_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMULATED_GPUS", "0")
    (tmp_path / "model.onnx").touch()
    with pytest.raises(EngineError, match="needs an NVIDIA GPU and its driver"):
        create_engine(NAME, tmp_path / "model.onnx")
