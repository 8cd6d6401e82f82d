"""Graphs for TensorRT, where TensorRT is not: each operator is checked against what its importer reads, and the
standard form of the graphs is run, with the caches that serve them, against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from blipstream_export.graphs import GraphInputs, export_graph, qformer_inputs, vision_inputs
from blipstream_export.lowering.tensorrt_operators import check_importable
from blipstream_export.lowering.tensorrt_reference import standard_form, write_standard_form
from blipstream_export.models.qformer import InstructionQFormer, QFormer
from blipstream_export.models.vision import VisionEncoder
from blipstream_export.typed import convert, weight_types
from torch import nn

from blipstream.contract import DECODER_FILE, DECODER_IO, PIXEL_VALUES, SOFT_TOKENS
from blipstream.engines import RowDecoder, create_engine, load_decoder
from blipstream.errors import CheckpointError, EngineError
from blipstream.manifest import DecoderSection
from tests.export.language_models import CAPACITY, VARIANTS, decode_along, make_model, module_of
from tests.support.checkpoints import make_blip2_opt

LOWERED = [
    *(("opt", name) for name in ("odd heads", "post-norm, narrow embeddings", "plain norms", "gelu")),
    *(("llama", name) for name in ("grouped heads, biased", "heads wider than the hidden state, tied", "yarn scaling")),
    *(("t5", name) for name in ("gated, tied, gelu", "few buckets")),
]
"""The variants whose graphs differ in what is lowered; ONNX Runtime's graphs are compared for all of them."""

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def export(module: nn.Module, inputs: GraphInputs, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a graph for TensorRT; the onnx package's full check and that of the importer's operators pass."""
    export_graph(module, inputs, path, engine="tensorrt", dtype=dtype)
    onnx.checker.check_model(path, full_check=True)
    check_importable(ir.load(path))
    return path


def export_language_model(
    language: str, model: Any, folder: Path, dtype: torch.dtype = torch.float32
) -> DecoderSection:
    module = module_of(language)
    sizes: DecoderSection = module.decoder_section(model.config, max_sequences=3, max_tokens=CAPACITY)
    fixed = {"capacity": sizes.max_tokens}
    if sizes.encoder is not None:
        fixed["prompt_capacity"] = sizes.encoder.max_tokens
    for graph in module.graphs(model, sizes):
        export(graph.module, graph.inputs.fixed(fixed), folder / graph.file, dtype)
    return sizes


def load(sizes: DecoderSection, folder: Path) -> RowDecoder:
    """The graphs in their standard form, on ONNX Runtime."""
    return load_decoder(
        sizes,
        lambda file: create_engine(
            "onnxruntime", write_standard_form(folder / file, folder / f"standard.{file}"), threads=1
        ),
    )


# --- what they compute -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("language", "name"), LOWERED)
def test_language_models_compute_the_logits_of_transformers(language: str, name: str, tmp_path: Path) -> None:
    model = make_model(language, VARIANTS[language][name])
    decoder = load(export_language_model(language, model, tmp_path), tmp_path)
    decode_along(decoder, model)
    decoder.close()


@pytest.mark.parametrize("language", ["opt", "llama", "t5"])
def test_half_precision_comes_near(language: str, tmp_path: Path) -> None:
    model = make_model(language)
    decoder = load(export_language_model(language, model, tmp_path, torch.float16), tmp_path)
    decode_along(
        decoder, model, tolerance=0.05
    )  # transformers' own fp16 errs by up to 1.2 % here, in most steps by 0.4 %
    decoder.close()


def test_image_graphs_equal_transformers(tmp_path: Path) -> None:
    model = make_blip2_opt()
    vision = export(VisionEncoder(model.vision_model), vision_inputs(28), tmp_path / "vision.onnx")
    qformer = export(QFormer(model), qformer_inputs(17, model.config.vision_config.hidden_size), tmp_path / "q.onnx")
    for batch in (1, 3):
        pixel_values = torch.randn(batch, 3, 28, 28, generator=torch.Generator().manual_seed(batch))
        expected = model.get_image_features(pixel_values, return_dict=True)
        found = {PIXEL_VALUES.name: pixel_values.numpy()}
        for path, wanted in ((vision, expected.last_hidden_state), (qformer, expected.pooler_output)):
            with create_engine("onnxruntime", write_standard_form(path, path.with_suffix(".std")), threads=1) as engine:
                found = engine.run(found)
            (values,) = found.values()
            assert values.dtype == np.float32
            np.testing.assert_allclose(values, wanted.numpy(), rtol=0, atol=5e-5 * float(wanted.abs().max()))


# --- what they are ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("language", "precision"), [("opt", "fp16"), ("llama", "bf16"), ("t5", "fp16"), ("t5", "bf16")]
)
def test_half_precision_graphs_compute_in_half_precision(language: str, precision: str, tmp_path: Path) -> None:
    """Caches have the type, other inputs and outputs are float32, and only what must be is computed in float32."""
    dtype = HALVES[precision]
    half = getattr(ir.DataType, {"fp16": "FLOAT16", "bf16": "BFLOAT16"}[precision])
    sizes = export_language_model(language, make_model(language), tmp_path, dtype)
    graph = ir.load(tmp_path / DECODER_FILE).graph
    caches = {*DECODER_IO.cache_inputs(sizes.num_layers), *DECODER_IO.cross_inputs(sizes.num_layers)}
    for value in graph.inputs:
        if value.dtype in (half, ir.DataType.FLOAT):
            assert (value.dtype == half) == (value.name in caches)
    types = {value.name: value.dtype for value in graph.outputs}
    assert types.pop(DECODER_IO.logits) == types.pop(DECODER_IO.sums) == ir.DataType.FLOAT
    assert types.pop(DECODER_IO.argmax) == ir.DataType.INT64
    assert set(types.values()) == {half}
    products = [node.outputs[0] for node in graph.all_nodes() if node.op_type in ("MatMul", "Gemm", "TRT_Attention")]
    wide = [value for value in products if value.dtype == ir.DataType.FLOAT]
    assert len(products) > 4
    assert len(wide) == (2 if language == "t5" and precision == "fp16" else 0)  # T5's wo, in each of two layers


@pytest.mark.parametrize(("instructed", "precision"), [(False, "fp16"), (True, "bf16")])
def test_half_precision_image_graphs(precision: str, instructed: bool, tmp_path: Path) -> None:
    from tests.support.instructblip import make_instructblip

    model = make_instructblip("opt", seed=1) if instructed else make_blip2_opt()
    wrapper = InstructionQFormer(model) if instructed else QFormer(model)
    inputs = qformer_inputs(17, model.config.vision_config.hidden_size, instructed=instructed)
    path = export(wrapper, inputs, tmp_path / "qformer.onnx", HALVES[precision])
    graph = ir.load(path).graph
    assert [value.name for value in graph.outputs] == [SOFT_TOKENS.name]
    attentions = [node for node in graph if node.op_type == "TRT_Attention"]
    assert attentions
    assert all(node.outputs[0].dtype not in (None, ir.DataType.FLOAT) for node in attentions)


def test_caches_are_updated_in_place_and_masks_are_made_once(tmp_path: Path) -> None:
    sizes = export_language_model("llama", make_model("llama"), tmp_path)
    graph = ir.load(tmp_path / DECODER_FILE).graph
    operators = [node.op_type for node in graph]
    assert operators.count("TensorScatter") == 2 * sizes.num_layers
    assert operators.count("LessOrEqual") == 1
    pairs = {
        (node.inputs[0].name, node.outputs[0].name)  # type: ignore[union-attr]
        for node in graph
        if node.op_type == "TensorScatter"
    }
    layers = sizes.num_layers
    assert pairs == set(zip(DECODER_IO.cache_inputs(layers), DECODER_IO.cache_outputs(layers), strict=True))
    shape = ["batch", sizes.num_key_value_heads, CAPACITY, sizes.head_dim]
    assert [str(dim) for dim in graph.outputs[1].shape or ()] == [str(dim) for dim in shape]


def test_the_cross_attentions_cache_is_no_output(tmp_path: Path) -> None:
    sizes = export_language_model("t5", make_model("t5"), tmp_path)
    graph = ir.load(tmp_path / DECODER_FILE).graph
    names = {value.name for value in (*graph.inputs, *graph.outputs)}
    assert not names & set(DECODER_IO.cross_outputs(sizes.num_layers))
    assert DECODER_IO.cross_total_sequence_length not in names
    assert names >= set(DECODER_IO.cross_inputs(sizes.num_layers))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_graphs_for_another_engine_are_not_importable(tmp_path: Path) -> None:
    model = make_blip2_opt()
    path = tmp_path / "vision.onnx"
    export_graph(VisionEncoder(model.vision_model), vision_inputs(28), path, engine="onnxruntime")
    with pytest.raises(EngineError, match=r"TensorRT reads: com\.microsoft\.MultiHeadAttention is not read"):
        check_importable(ir.load(path))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("g (int64[N] x) => (int64[N] y) { y = Clip(x, low, high) }", "Clip is not read for INT64"),
        ("g (float[1] x) => (float y) { y = Squeeze(x) }", "Squeeze is read with constant axes alone"),
        (
            "g (float[B, 2, T, 4] x, float[B, 2, 1, 4] u) => (float[B, 2, T, 4] y) { y = TensorScatter(x, u) }",
            "T is known",
        ),
        (
            "g (float[B, 2, 8, 4] x, float[B, 2, 1, 4] u) => (float[B, 2, 8, 4] z)"
            " { y = TensorScatter(x, u) z = Neg(y) }",
            "its result an output",
        ),
    ],
)
def test_what_the_importer_does_not_read_is_named(text: str, fault: str) -> None:
    scalars = "int64 low = {0}, int64 high = {5}" if "low" in text else ""
    head, body = text.split("{", 1)
    graph = f"{head}<{scalars}> {{{body}" if scalars else text
    model = onnx.parser.parse_model(f'<ir_version: 12, opset_import: ["" : 24]> {graph}')
    with pytest.raises(EngineError, match=fault):
        check_importable(ir.from_proto(model))


def test_an_attribute_without_a_written_meaning_is_not_ignored(tmp_path: Path) -> None:
    export_language_model("opt", make_model("opt"), tmp_path)
    model = ir.load(tmp_path / DECODER_FILE)
    node = next(node for node in model.graph if node.op_type == "TRT_Attention")
    node.attributes["causal_kind"] = ir.AttrString("causal_kind", "lower_right")
    with pytest.raises(EngineError, match="causal_kind of TRT_Attention is not written down"):
        standard_form(model)


def test_weights_beyond_fp16_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"fc1\.weight has values up to 1e\+05, beyond the range of fp16"):
        convert(torch.tensor([1e5, 1.0]), torch.float16, "fc1.weight")
    assert convert(torch.tensor([1e5]), torch.bfloat16, "fc1.weight").dtype == torch.bfloat16


def test_only_fp16_keeps_parts_of_t5_wide() -> None:
    (graph, _) = module_of("t5").graphs(
        model := make_model("t5"), module_of("t5").decoder_section(model.config, max_sequences=3, max_tokens=CAPACITY)
    )
    for dtype, wide in ((torch.float16, 2), (torch.bfloat16, 0)):
        types = weight_types(graph.module, dtype)
        assert sum(id(parameter) not in types for parameter in graph.module.parameters()) == wide
