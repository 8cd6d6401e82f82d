"""TensorRT's engine class and its caches, on a simulated GPU: every address, copy, profile and graph is real, the
kernels are ONNX Runtime's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blipstream_export.graphs import export_graph, vision_inputs
from blipstream_export.models.vision import VisionEncoder

from blipstream.contract import IMAGE_EMBEDS, PIXEL_VALUES
from blipstream.decoding.logits import reduced
from blipstream.engines import Engine, RowDecoder, create_engine, load_decoder
from blipstream.errors import EngineError
from blipstream.manifest import DecoderSection
from tests.export.language_models import CAPACITY, decode_along, make_model, make_prompts, module_of
from tests.support.checkpoints import make_blip2_opt

NUM_QUERIES = 4
MAX_SEQUENCES = 3


def build_language_model(
    language: str, model: Any, folder: Path, dtype: torch.dtype = torch.float32
) -> tuple[DecoderSection, RowDecoder]:
    from blipstream_export.plans.builder import PlanBuilder, PlanOptions
    from blipstream_export.plans.profiles import ServedShapes

    module = module_of(language)
    sizes: DecoderSection = module.decoder_section(model.config, max_sequences=MAX_SEQUENCES, max_tokens=CAPACITY)
    served = ServedShapes(1, NUM_QUERIES, 1, None, sizes)
    fixed = {"capacity": sizes.max_tokens, "prompt_capacity": sizes.max_prompt_tokens}
    builder = PlanBuilder(PlanOptions())
    with torch.no_grad():
        for graph in module.graphs(model, sizes):
            path = folder / graph.file
            export_graph(graph.module, graph.inputs.fixed(fixed), path, engine="tensorrt", dtype=dtype)
            builder.build(path, path.with_suffix(".plan"), getattr(served, path.stem)())
    return sizes, load_decoder(sizes, lambda file: create_engine("tensorrt", (folder / file).with_suffix(".plan")))


def build_vision(folder: Path, max_batch: int = 4) -> Engine:
    from blipstream_export.plans.builder import PlanBuilder, PlanOptions
    from blipstream_export.plans.profiles import image_profiles

    path = folder / "model.onnx"
    export_graph(VisionEncoder(make_blip2_opt().vision_model), vision_inputs(28), path, engine="tensorrt")
    PlanBuilder(PlanOptions()).build(path, path.with_suffix(".plan"), image_profiles(max_batch))
    return create_engine("tensorrt", path.with_suffix(".plan"))


@pytest.mark.parametrize("language", ["opt", "llama", "t5"])
def test_language_models_compute_the_logits_of_transformers(language: str, tmp_path: Path) -> None:
    model = make_model(language)
    _, decoder = build_language_model(language, model, tmp_path)
    with torch.no_grad():
        decode_along(decoder, model)
    decoder.close()


def test_greedy_tokens_come_without_their_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a captured step; a row is copied when it is asked for, and is the row of its own sequence."""
    from blipstream.engines import cuda

    copied: list[int] = []
    copy = cuda.copy_to_host
    monkeypatch.setattr(cuda, "copy_to_host", lambda *arguments: copied.append(1) or copy(*arguments))
    model = make_model("opt")
    _, decoder = build_language_model("opt", model, tmp_path)
    prompts = make_prompts(model, [(4, 5), (2, 1), (1, 12)])
    results = [decoder.prefill(0, prompts[:1]), decoder.prefill(1, prompts[1:])]
    lengths = np.array([prompt.num_tokens for prompt in prompts])
    for _ in range(3):
        results = [decoder.decode(np.array([5, 6, 7]), lengths)]
        assert not copied
    (logits,) = results
    rows = np.array(logits)
    assert len(copied) == len(rows) == 3
    argmax, sums = reduced(logits)
    np.testing.assert_array_equal(argmax, rows.argmax(axis=1))
    np.testing.assert_allclose(sums, rows.sum(axis=1), rtol=1e-4, atol=1e-3)
    with pytest.raises(IndexError, match="row 3 of 3"):
        logits[3]
    decoder.close()


@pytest.mark.parametrize("language", ["opt", "t5"])
def test_caches_in_half_precision(language: str, tmp_path: Path) -> None:
    model = make_model(language)
    _, decoder = build_language_model(language, model, tmp_path, torch.float16)
    with torch.no_grad():
        decode_along(decoder, model, tolerance=0.05)
    decoder.close()


@pytest.mark.parametrize("language", ["opt", "t5"])
def test_a_moved_row_goes_on_where_it_was(language: str, tmp_path: Path) -> None:
    """Also after steps were captured: a graph repeats addresses, and the row's contents have changed under it."""
    _, decoder = build_language_model(language, make_model(language), tmp_path)
    prompts = make_prompts(make_model(language), [(4, 3), (2, 6), (3, 1)])
    start = 1 if language == "t5" else None
    lengths = np.array([start or prompt.num_tokens for prompt in prompts])
    decoder.prefill(0, prompts)
    token = np.array([7, 8, 9])
    for _ in range(3):  # the third is a graph's
        decoder.decode(token, lengths)
    expected = np.array(decoder.decode(token, lengths))
    decoder.move_row(2, 0, int(lengths[2]))
    found = decoder.decode(token[[2, 1]], lengths[[2, 1]])
    for _ in range(3):
        np.testing.assert_allclose(found, expected[[2, 1]], atol=1e-5)
        found = decoder.decode(token[[2, 1]], lengths[[2, 1]])
    decoder.close()


def test_a_repeated_run_is_captured_once_and_a_single_run_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blipstream.engines import cuda

    captures: list[object] = []
    capture = cuda.Stream.capture
    monkeypatch.setattr(cuda.Stream, "capture", lambda stream, work: captures.append(work) or capture(stream, work))
    _, decoder = build_language_model("opt", make_model("opt"), tmp_path)
    for first, prompt in enumerate(make_prompts(make_model("opt"), [(4, 3), (2, 6)])):
        decoder.prefill(first, [prompt])
    assert not captures
    for count in (1, 2, 1, 2, 1, 2):
        decoder.decode(np.full(count, 5), np.full(count, 8))
    assert len(captures) == 2
    decoder.close()


def test_single_runs_of_several_sizes_equal_onnxruntime(tmp_path: Path) -> None:
    from blipstream_export.lowering.tensorrt_reference import write_standard_form

    standard = tmp_path / "standard.onnx"
    with build_vision(tmp_path) as engine:
        write_standard_form(tmp_path / "model.onnx", standard)
        with create_engine("onnxruntime", standard, threads=1) as reference:
            for batch in (1, 4, 2):
                pixels = np.random.default_rng(batch).standard_normal((batch, 3, 28, 28)).astype(np.float32)
                found = engine.run({PIXEL_VALUES.name: pixels})
                np.testing.assert_array_equal(
                    found[IMAGE_EMBEDS.name], reference.run({PIXEL_VALUES.name: pixels})[IMAGE_EMBEDS.name]
                )


def test_a_captured_run_outlives_its_engine(tmp_path: Path) -> None:
    """It keeps the memory that it was recorded with; nothing else may be given that memory."""
    from blipstream.engines import cuda

    engine = build_vision(tmp_path)
    pixels = engine.allocate_host((1, 3, 28, 28), np.float32)
    embeds = engine.allocate_host((1, 17, 36), np.float32)
    pixels[:] = np.random.default_rng(0).standard_normal(pixels.shape)
    run = engine.bind({PIXEL_VALUES.name: pixels}, {IMAGE_EMBEDS.name: embeds})
    run.run()
    run.run()
    expected = embeds.copy()
    free = cuda.call(cuda.runtime.cudaMemGetInfo)[0]
    engine.close()
    assert cuda.call(cuda.runtime.cudaMemGetInfo)[0] == free
    embeds.fill(0)
    run.run()
    np.testing.assert_array_equal(embeds, expected)
    del run
    assert cuda.call(cuda.runtime.cudaMemGetInfo)[0] > free


# --- what is refused -------------------------------------------------------------------------------------------------


def test_shapes_that_the_plan_was_not_built_for(tmp_path: Path) -> None:
    with build_vision(tmp_path, max_batch=2) as engine:
        pixels = np.zeros((3, 3, 28, 28), np.float32)
        text = r"pixel_values \[3, 3, 28, 28\]: expected .*\[1, 3, 28, 28\] to \[1, .*; or .*\[2, 3, 28, 28\] to \[2,"
        with pytest.raises(EngineError, match=text):
            engine.run({PIXEL_VALUES.name: pixels})
        engine.run({PIXEL_VALUES.name: pixels[:2]})


def test_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_vision(tmp_path).close()
    monkeypatch.setenv("SIMULATED_GPUS", "0")
    with pytest.raises(EngineError, match=r"needs an NVIDIA GPU and its driver, but .*no CUDA-capable device"):
        create_engine("tensorrt", tmp_path / "model.plan")


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ('"version": "11.4', '"version": "11.1', r"TensorRT 11\.4\S* on Simulated GPU cannot load .*version 11\.1"),
        ('"capability": [9', '"capability": [8', "cannot load .* compute capability"),
        ('{"version"', "not a plan", "cannot load .* magic tag"),
    ],
)
def test_plans_of_another_kind(old: str, new: str, text: str, tmp_path: Path) -> None:
    build_vision(tmp_path).close()
    plan = tmp_path / "model.plan"
    content = plan.read_text()
    assert old in content
    plan.write_text(content.replace(old, new))
    with pytest.raises(EngineError, match=text):
        create_engine("tensorrt", plan)


def test_a_missing_plan(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"there is no TensorRT engine at .*none\.plan"):
        create_engine("tensorrt", tmp_path / "none.plan")


def test_memory_that_is_not_there(tmp_path: Path) -> None:
    from blipstream.engines import cuda
    from blipstream.engines.cache import CacheShape

    engine = build_vision(tmp_path)
    shape = CacheShape(num_layers=32, num_rows=64, num_heads=32, max_tokens=1024, head_dim=80)
    with pytest.raises(EngineError, match=r"bytes of GPU memory were asked for, and .* are free: .*out of memory"):
        engine.allocate_cache("past_key.0", shape)
    assert isinstance(cuda.allocate((2,), np.float16).address, int)
    engine.close()


def test_a_closed_engine(tmp_path: Path) -> None:
    engine = build_vision(tmp_path)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="the engine is closed"):
        engine.run({PIXEL_VALUES.name: np.zeros((1, 3, 28, 28), np.float32)})
