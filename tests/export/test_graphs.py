"""The ONNX graphs, on the engine that serves them, compute what transformers computes."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from blipstream_export import initializers
from blipstream_export.build import BuildResult
from blipstream_export.graphs import decoder_inputs, export_graph
from blipstream_export.models import opt
from blipstream_export.models.opt import OPTDecoder

from blipstream.contract import (
    BLIP2,
    DECODER_FILE,
    DECODER_IO,
    GRAPH_FILE,
    MODEL_VERSION,
    PIXEL_VALUES,
    QFORMER,
    QFORMER_SPEC,
    SOFT_TOKENS,
    VISION_ENCODER,
    VISION_ENCODER_SPEC,
    ModelSpec,
)
from blipstream.decoding.request import Prompt
from blipstream.engines import CachedDecoder, create_engine
from blipstream.manifest import DecoderSection
from tests.support.checkpoints import make_blip2_opt

NEW_TOKENS = 14
ROWS = 4


@pytest.mark.parametrize(
    ("model", "spec"), [(VISION_ENCODER, VISION_ENCODER_SPEC), (QFORMER, QFORMER_SPEC)], ids=[VISION_ENCODER, QFORMER]
)
def test_graph_has_the_tensors_of_the_contract(model: str, spec: ModelSpec, random_bundle: BuildResult) -> None:
    with create_engine("onnxruntime", random_bundle.bundle / model / MODEL_VERSION / GRAPH_FILE, threads=1) as engine:
        for infos, tensors in ((engine.inputs, spec.inputs), (engine.outputs, spec.outputs)):
            assert [info.name for info in infos] == [tensor.name for tensor in tensors]
            assert [info.dtype for info in infos] == [np.float32] * len(tensors)
            assert [info.shape for info in infos] == [
                ("batch", *random_bundle.manifest.shape(tensor)) for tensor in tensors
            ]


def test_decoder_graph_has_the_tensors_of_the_contract(random_bundle: BuildResult) -> None:
    sizes = random_bundle.manifest.decoder
    with create_engine("onnxruntime", random_bundle.bundle / BLIP2 / MODEL_VERSION / DECODER_FILE, threads=1) as engine:
        inputs = {info.name: (info.dtype, info.shape) for info in engine.inputs}
        outputs = {info.name: (info.dtype, info.shape) for info in engine.outputs}
    cache = (np.float32, ("batch", sizes.num_key_value_heads, "capacity", sizes.head_dim))
    assert inputs == {
        DECODER_IO.input_ids: (np.int64, ("batch", "sequence")),
        DECODER_IO.soft_tokens: (np.float32, ("num_soft_tokens", sizes.hidden_size)),
        DECODER_IO.position_ids: (np.int64, ("batch", "sequence")),
        DECODER_IO.last_index: (np.int64, ("batch",)),
        DECODER_IO.seqlens_k: (np.int32, ("batch",)),
        DECODER_IO.total_sequence_length: (np.int32, ()),
        **dict.fromkeys(DECODER_IO.cache_inputs(sizes.num_layers), cache),
    }
    assert outputs == {
        DECODER_IO.logits: (np.float32, ("batch", sizes.vocab_size)),
        **dict.fromkeys(DECODER_IO.cache_outputs(sizes.num_layers), cache),
    }


@pytest.mark.parametrize("batch", [1, 3])
def test_image_graphs_equal_transformers_at_any_batch_size(batch: int, random_bundle: BuildResult) -> None:
    model = make_blip2_opt()
    pixel_values = torch.randn(batch, 3, 28, 28, generator=torch.Generator().manual_seed(batch))
    with torch.no_grad():
        expected = model.get_image_features(pixel_values, return_dict=True)
    vision, qformer = (
        create_engine("onnxruntime", random_bundle.bundle / name / MODEL_VERSION / GRAPH_FILE, threads=1)
        for name in (VISION_ENCODER, QFORMER)
    )
    with vision, qformer:
        image_embeds = vision.run({PIXEL_VALUES.name: pixel_values.numpy()})
        soft_tokens = qformer.run(image_embeds)[SOFT_TOKENS.name]
    _assert_close(image_embeds["image_embeds"], expected.last_hidden_state.numpy())
    _assert_close(soft_tokens, expected.pooler_output.numpy())


def test_graphs_use_the_fused_operators_and_carry_no_traces(random_bundle: BuildResult) -> None:
    """One node for each attention, norm and activation, and nothing that tells where or when it was built."""
    operators: dict[str, set[str]] = {}
    for path in random_bundle.bundle.rglob("*.onnx"):
        model = onnx.load(path)
        operators[path.parent.parent.name] = {node.op_type for node in model.graph.node}
        assert not model.metadata_props
        assert not model.doc_string
        assert all(not node.metadata_props and not node.doc_string for node in model.graph.node)
        assert all(not value.metadata_props for value in model.graph.value_info)
        assert b"/site-packages/" not in path.read_bytes()
    assert {"MultiHeadAttention", "LayerNormalization", "Gelu", "Gemm"} <= operators[VISION_ENCODER]
    assert {"MultiHeadAttention", "LayerNormalization", "Gelu", "Gemm"} <= operators[QFORMER]
    assert {"GroupQueryAttention", "LayerNormalization", "Gemm"} <= operators[BLIP2]
    assert "MatMul" not in set.union(*operators.values())
    assert "Softmax" not in set.union(*operators.values())


def test_large_weights_go_to_a_file_of_their_own_and_tied_ones_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_blip2_opt().language_model
    wrapper, sizes = OPTDecoder(model), _sizes(model)
    inline, external = tmp_path / "inline.onnx", tmp_path / "external.onnx"
    inline_bytes = export_graph(wrapper, decoder_inputs(sizes), inline, engine="onnxruntime")
    monkeypatch.setattr(initializers, "EXTERNAL_DATA_BYTES", 10_000)
    external_bytes = export_graph(wrapper, decoder_inputs(sizes), external, engine="onnxruntime")
    data = tmp_path / "external.onnx.data"

    assert sorted(path.name for path in tmp_path.iterdir()) == ["external.onnx", "external.onnx.data", "inline.onnx"]
    assert inline_bytes == inline.stat().st_size
    assert external_bytes == external.stat().st_size + data.stat().st_size
    weights = sum(parameter.numel() * 4 for parameter in wrapper.parameters())  # counts shared ones once
    assert weights <= inline_bytes < weights + 50_000
    logits = []
    for path in (inline, external):
        decoder = CachedDecoder(create_engine("onnxruntime", path, threads=1), sizes)
        logits.append(decoder.prefill(0, [Prompt(np.ones((2, sizes.hidden_size), np.float32), (2, 17, 40))]))
        decoder.close()
    np.testing.assert_array_equal(*logits)


def test_weights_are_released_after_export(tmp_path: Path) -> None:
    model = make_blip2_opt().language_model
    wrapper, sizes = OPTDecoder(model), _sizes(model)
    del model
    references = [weakref.ref(parameter) for parameter in wrapper.parameters()]
    export_graph(wrapper, decoder_inputs(sizes), tmp_path / "decoder.onnx", engine="onnxruntime")
    del wrapper
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


def _sizes(language_model: Any) -> DecoderSection:
    return opt.decoder_section(language_model.config, max_sequences=ROWS, max_tokens=64)


def _assert_close(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5 * np.abs(expected).max())
