"""Each kind of language model: its wrappers and its graphs compute what transformers computes, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from blipstream_export.deferred import Deferred, materialize
from blipstream_export.families import LANGUAGE_MODELS, LanguageModel
from blipstream_export.graphs import export_graph
from blipstream_export.initializers import SharedWeights
from blipstream_export.models import llama, t5
from blipstream_export.models.llama import LlamaDecoder
from blipstream_export.models.t5 import T5Decoder, T5Encoder

from blipstream.contract import DECODER_FILE, DECODER_IO, ENCODER_FILE
from blipstream.engines import create_engine
from blipstream.engines.decoder import pack_prompts, prefill_inputs
from blipstream.errors import CheckpointError, UnsupportedCheckpointError
from blipstream.manifest import DecoderSection, Precision
from tests.export.language_models import (
    CAPACITY,
    CASES,
    VARIANTS,
    VOCAB_SIZE,
    Exported,
    Exporter,
    assert_close,
    decode_along,
    expected_logits,
    make_model,
    make_prompts,
    module_of,
)
from tests.support.deferring import defer_parameters
from tests.support.languages import LANGUAGES, LLAMA_VARIANTS, T5_VARIANTS


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


# --- wrappers, run eagerly -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LLAMA_VARIANTS)
def test_llama_decoder(name: str) -> None:
    """Prefill of three rows of unequal lengths, then decode steps, against the whole sequences in transformers."""
    model = make_model("llama", LLAMA_VARIANTS[name])
    sizes = llama.decoder_section(model.config, max_sequences=3, max_tokens=CAPACITY)
    decoder = LlamaDecoder(model, CAPACITY)
    prompts = make_prompts(model, [(4, 5), (2, 1), (1, 12)])
    inputs = {key: torch.from_numpy(value) for key, value in prefill_inputs(prompts).items()}
    rows = (3, sizes.num_key_value_heads, CAPACITY, sizes.head_dim)
    cache = [torch.zeros(rows) for _ in range(2 * sizes.num_layers)]
    logits, *cache = decoder(*inputs.values(), cache)
    generated: list[list[int]] = [[], [], []]
    unused, first = torch.zeros(1, sizes.hidden_size), torch.zeros(3, dtype=torch.int64)
    for step in range(3):
        expected = [expected_logits(model, *row) for row in zip(prompts, generated, strict=True)]
        assert_close(logits, torch.from_numpy(np.stack(expected)))
        for row, token in zip(generated, (17, 3, 11), strict=True):
            row.append(token + step)
        lengths = torch.tensor([prompt.num_tokens + step for prompt in prompts])
        tokens, total = torch.tensor([[row[-1]] for row in generated]), (lengths.max() + 1).int()
        logits, *cache = decoder(tokens, unused, lengths[:, None], first, lengths.int(), total, cache)


@pytest.mark.parametrize("name", T5_VARIANTS)
def test_t5_encoder_and_decoder(name: str) -> None:
    """Prompts of unequal lengths, then decode steps, against the whole sequences in transformers."""
    model = make_model("t5", T5_VARIANTS[name])
    sizes = t5.decoder_section(model.config, max_sequences=3, max_tokens=CAPACITY)
    assert sizes.encoder is not None
    prompts = make_prompts(model, [(4, 5), (2, 1), (1, 18)])
    ids, soft, lengths = (torch.from_numpy(x) for x in pack_prompts(prompts))
    encoded = T5Encoder(model)(ids, soft, lengths.int())
    assert len(encoded) == 2 * sizes.num_layers
    cross = [torch.full((*x.shape[:2], CAPACITY, x.shape[3]), torch.nan) for x in encoded]
    for whole, part in zip(cross, encoded, strict=True):
        for row, length in enumerate(lengths.tolist()):
            whole[row, :, :length] = part[row, :, :length]  # what is behind a row's length must not be read
    decoder = T5Decoder(model)
    rows = (3, sizes.num_key_value_heads, CAPACITY, sizes.head_dim)
    cache = [torch.zeros(rows) for _ in range(2 * sizes.num_layers)]
    cross_lengths = ((lengths - 1).int(), lengths.max().int())
    generated: list[list[int]] = [[], [], []]
    start = sizes.encoder.decoder_start_token_id
    for step in range(12):  # beyond the smallest of the distances that have a bias of their own
        tokens = torch.tensor([[([start, *row])[-1]] for row in generated])
        positions = torch.full((3, 1), step)
        logits, *caches = decoder(
            tokens, positions, positions[:, 0].int(), torch.tensor(step + 1).int(), *cross_lengths, cache, cross
        )
        cache, unchanged = caches[: len(cache)], caches[len(cache) :]
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(cross, unchanged, strict=True))
        expected = [expected_logits(model, *row) for row in zip(prompts, generated, strict=True)]
        assert_close(logits, torch.from_numpy(np.stack(expected)))
        for row, token in zip(generated, (17, 3, 40), strict=True):
            row.append(token + step)


@pytest.mark.parametrize(("language", "name"), CASES)
def test_wrapping_a_deferred_model_computes_no_weights(language: str, name: str) -> None:
    model = make_model(language, VARIANTS[language][name])
    sizes = module_of(language).decoder_section(model.config, max_sequences=2, max_tokens=CAPACITY)
    real = list(module_of(language).graphs(model, sizes))
    defer_parameters(model)
    for first, second in zip(real, module_of(language).graphs(model, sizes), strict=True):
        expected, found = first.module.state_dict(), dict(second.module.named_parameters(remove_duplicate=False))
        assert found.keys() == expected.keys()
        for key, parameter in found.items():
            assert torch.equal(materialize(parameter), expected[key])
            assert isinstance(parameter, Deferred) or re.fullmatch(r"bias|.*\.rotary\.(cos|sin)|.*norm\.\w+", key), (
                f"{key} was computed when the model was wrapped"
            )


@pytest.mark.parametrize("language", ["llama", "t5"])
def test_tied_embeddings_are_one_tensor(language: str) -> None:
    def wrap(tied: bool) -> Any:
        model = make_model(language, {"tie_word_embeddings": tied})
        return LlamaDecoder(model, CAPACITY) if language == "llama" else T5Decoder(model)

    tied, untied = wrap(True), wrap(False)
    assert tied.lm_head is None
    assert "lm_head.weight" not in tied.state_dict()
    assert not torch.equal(untied.lm_head.weight, untied.embed_tokens.weight)


def test_t5_scales_its_logits_where_transformers_does() -> None:
    assert T5Decoder(make_model("t5", {"tie_word_embeddings": True})).logits_scale == 48**-0.5
    assert T5Decoder(make_model("t5")).logits_scale is None


def test_t5_keeps_the_type_of_its_last_linear_layer() -> None:
    """In half precision transformers keeps ``wo`` in fp32; the wrapper then computes in fp32 there, and goes on so."""
    model = make_model("t5")
    encoder = model.encoder
    for name, parameter in encoder.named_parameters():
        if ".wo." not in name:
            parameter.data = parameter.data.bfloat16()
    model.decoder.bfloat16()
    wrapper = T5Encoder(model)
    layer = wrapper.layers[0].feed_forward
    hidden = torch.randn(4, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = layer(hidden)
    assert found.dtype == torch.float32
    assert_close(found, encoder.block[0].layer[1](hidden[None])[0])


# --- graphs, on the engine that serves them --------------------------------------------------------------------------


@pytest.mark.parametrize(("tied", "precision"), [(True, "fp32"), (True, "int8"), (True, "int4"), (False, "int8")])
def test_embeddings_of_t5_are_stored_once(tied: bool, precision: Precision, tmp_path: Path) -> None:
    """Both graphs look words up, and one multiplies with the same table if it is tied: in int8 as in fp32."""
    model = make_model("t5", {"tie_word_embeddings": tied, "num_layers": 1, "num_decoder_layers": 1})
    defer_parameters(model)
    module, shared = module_of("t5"), SharedWeights()
    places, heads = [], 0
    for graph in module.graphs(model, module.decoder_section(model.config, max_sequences=2, max_tokens=CAPACITY)):
        path, sharing = tmp_path / graph.file, {"head_tables": graph.head_tables, "shared": shared}
        export_graph(graph.module, graph.inputs, path, engine="onnxruntime", precision=precision, **sharing)
        saved = onnx.load(path, load_external_data=False).graph
        tables = {node.input[0] for node in saved.node if node.op_type == "Gather"}
        sizes = {tuple(x.dims): x for x in saved.initializer if x.name in tables}
        table = sizes.get((model.config.vocab_size, 48)) or sizes[48, model.config.vocab_size]
        places.append({entry.key: entry.value for entry in table.external_data})
        heads += sum(table.name in node.input and node.op_type != "Gather" for node in saved.node)
        create_engine("onnxruntime", path, threads=1).close()
    assert places[0] == places[1]
    assert heads == (1 if tied else 0)


@pytest.mark.parametrize("name", T5_VARIANTS)
def test_graphs_of_t5_compute_the_logits_of_transformers(name: str, exported: Exporter) -> None:
    found = exported("t5", name)
    decoder = found.load()
    decode_along(decoder, found.model)
    decoder.close()


@pytest.mark.parametrize(
    ("language", "file", "operators"),
    [
        ("llama", DECODER_FILE, {"GroupQueryAttention", "SimplifiedLayerNormalization", "Gemm"}),
        ("t5", ENCODER_FILE, {"MultiHeadAttention", "SimplifiedLayerNormalization", "Gemm"}),
        ("t5", DECODER_FILE, {"GroupQueryAttention", "SimplifiedLayerNormalization", "Gemm"}),
    ],
)
def test_graphs_use_the_fused_operators(language: str, file: str, operators: set[str], exported: Exporter) -> None:
    plain = next(iter(VARIANTS[language]))
    graph = onnx.load(exported(language, plain).folder / file).graph
    found = [node.op_type for node in graph.node]
    assert operators <= set(found)
    assert not {"MatMul", "Softmax", "ReduceMean"} & set(found)
    assert found.count("Range") <= 1  # the bias of T5 is made once for all layers
    assert found.count("GroupQueryAttention") == {"llama": 2, "t5": 4}[language] * (file == DECODER_FILE)
    assert all(value.name in _names(graph.node) for value in graph.output)


def test_graphs_of_an_encoder_decoder_have_the_tensors_of_the_contract(tmp_path: Path) -> None:
    Exported.export("t5", make_model("t5", {"num_layers": 3, "num_decoder_layers": 2}), tmp_path)
    with create_engine("onnxruntime", tmp_path / ENCODER_FILE, threads=1) as engine:
        assert {info.name: (info.dtype, info.shape) for info in engine.inputs} == {
            "input_ids": (np.int64, ("batch", "sequence")),
            "soft_tokens": (np.float32, ("num_soft_tokens", 48)),
            "lengths": (np.int32, ("batch",)),
        }
        assert [info.name for info in engine.outputs] == [
            "cross_key.0",
            "cross_value.0",
            "cross_key.1",
            "cross_value.1",
        ]
        assert {info.shape for info in engine.outputs} == {("batch", 3, "sequence", 8)}
    with create_engine("onnxruntime", tmp_path / DECODER_FILE, threads=1) as engine:
        inputs = {info.name: (info.dtype, info.shape) for info in engine.inputs}
        outputs = {info.name: info.shape for info in engine.outputs}
    cache, cross = (("batch", 3, capacity, 8) for capacity in ("capacity", "prompt_capacity"))
    assert inputs == {
        DECODER_IO.input_ids: (np.int64, ("batch", 1)),
        DECODER_IO.position_ids: (np.int64, ("batch", 1)),
        DECODER_IO.seqlens_k: (np.int32, ("batch",)),
        DECODER_IO.total_sequence_length: (np.int32, ()),
        DECODER_IO.cross_seqlens_k: (np.int32, ("batch",)),
        DECODER_IO.cross_total_sequence_length: (np.int32, ()),
        **dict.fromkeys(DECODER_IO.cache_inputs(2), (np.float32, cache)),
        **dict.fromkeys(DECODER_IO.cross_inputs(2), (np.float32, cross)),
    }
    assert outputs == {
        DECODER_IO.logits: ("batch", 62),
        **dict.fromkeys(DECODER_IO.cache_outputs(2), cache),
        **dict.fromkeys(DECODER_IO.cross_outputs(2), cross),
    }


# --- sizes and refusals ----------------------------------------------------------------------------------------------


def config_of(language: str, **fields: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**LANGUAGES[language].config(VOCAB_SIZE[language], fields))


def test_sizes_of_llama() -> None:
    config = config_of("llama", head_dim=20, num_key_value_heads=2, max_position_embeddings=99)
    assert llama.max_positions(config) == 99
    assert llama.decoder_section(config, max_sequences=5, max_tokens=70) == DecoderSection(
        family="llama",
        num_layers=2,
        num_key_value_heads=2,
        head_dim=32,  # two halves of 10, each padded to 16
        hidden_size=48,
        vocab_size=340,
        max_sequences=5,
        max_tokens=70,
    )


def test_sizes_of_t5() -> None:
    sizes = t5.decoder_section(config_of("t5", num_decoder_layers=3), max_sequences=5, max_tokens=70)
    assert t5.max_positions(config_of("t5")) is None
    assert sizes.model_dump() == {
        "family": "t5",
        "num_layers": 3,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "hidden_size": 48,
        "vocab_size": 62,
        "max_sequences": 5,
        "max_tokens": 71,  # the start token and 70 of an answer
        "encoder": {"num_heads": 3, "head_dim": 8, "max_tokens": 70, "decoder_start_token_id": 0},
    }
    assert sizes.max_prompt_tokens == 70
    assert [sizes.room_behind(length) for length in (1, 70, 71)] == [70, 70, 0]


def test_t5_starts_with_the_begin_token_where_it_has_no_start_token() -> None:
    config = config_of("t5", decoder_start_token_id=None, bos_token_id=7)
    t5.check_config(config, "x")
    sizes = t5.decoder_section(config, max_sequences=1, max_tokens=9)
    assert sizes.encoder is not None
    assert sizes.encoder.decoder_start_token_id == 7


@pytest.mark.parametrize(
    ("language", "fields", "message"),
    [
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "the language model of x has rotary positions of type 'dynamic', and only those are served whose angles do "
            "not depend on the length of the sequence: default, linear, llama3, yarn, proportional",
        ),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "short_factor": [1.0] * 6,
                    "long_factor": [2.0] * 6,
                    "original_max_position_embeddings": 24,
                }
            },
            "has rotary positions of type 'longrope', and only those are served",
        ),
        (
            "llama",
            {"num_key_value_heads": 3},
            "the language model of x has 4 attention heads, which cannot share 3 key and value heads evenly",
        ),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "linear",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "partial_rotary_factor": 0.5,
                }
            },
            "rotary positions of type 'linear' with partial_rotary_factor = 0.5, which LLaMA in transformers cannot",
        ),
        (
            "t5",
            {"decoder_start_token_id": None, "bos_token_id": None},
            "the language model of x has neither decoder_start_token_id nor bos_token_id, and one of them is what an",
        ),
        (
            "t5",
            {"decoder_start_token_id": 62},
            "decoder_start_token_id = 62 of x is outside the language model's vocabulary of 62 tokens",
        ),
    ],
)
def test_what_is_not_served_is_refused_by_name(language: str, fields: dict[str, Any], message: str) -> None:
    config = config_of(language, **fields)
    with pytest.raises(CheckpointError, match=message) as raised:
        module_of(language).check_config(config, "x")
    assert isinstance(raised.value, UnsupportedCheckpointError) == (language == "llama")
    assert "\n" not in str(raised.value)


def test_a_language_model_is_a_line_and_a_module_with_four_functions() -> None:
    for line in LANGUAGE_MODELS:
        assert isinstance(line, LanguageModel)
        module = line.load()
        assert all(callable(getattr(module, name)) for name in ("check_config", "max_positions", "decoder_section"))
        assert callable(module.graphs)


def _names(nodes: Any) -> set[str]:
    return {name for node in nodes for name in node.output}
