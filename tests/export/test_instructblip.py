"""Checkpoints and bundles of InstructBLIP: what their Q-Former reads besides the image."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from blipstream_export.build import BuildOptions, BuildResult, build
from blipstream_export.checkpoint import load_model, open_checkpoint
from blipstream_export.generation import generation_section
from blipstream_export.reference import compute_reference
from blipstream_export.tokenizer import check_qformer_tokenizer, check_tokenizer, processor_ids

from blipstream.contract import (
    BLIP2,
    GRAPH_FILE,
    IMAGE_EMBEDS,
    INSTRUCTED_QFORMER_SPEC,
    MODEL_VERSION,
    QFORMER,
    SOFT_TOKENS,
    TensorSpec,
)
from blipstream.engines import create_engine
from blipstream.errors import BundleError, CheckpointError, UnsupportedCheckpointError
from blipstream.instructions import InstructionEncoder, instruction_inputs, pad_instructions
from tests.export.damage import Fault, cut, edit, put, remove
from tests.support.checkpoints import TinySizes
from tests.support.instructblip import (
    QFORMER_POSITIONS,
    QFORMER_VOCAB_SIZE,
    make_instructblip,
    make_instructblip_processor,
    make_qformer_tokenizer,
    save_instructblip,
    save_instructblipvideo,
)
from tests.support.languages import opt_tokenizer

TEXTS = ("", "What colour is the dog?", "ünïcode 北京", "a  b\nc")


@pytest.fixture(scope="module")
def whole_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_instructblip(tmp_path_factory.mktemp("instructblip") / "random")


@pytest.fixture(scope="module")
def result(whole_checkpoint: Path) -> BuildResult:
    return build(str(whole_checkpoint), whole_checkpoint.parent / "bundle", BuildOptions(max_sequences=4))


@pytest.fixture
def checkpoint(whole_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(whole_checkpoint, tmp_path / "checkpoint"))


# --- bundles ---------------------------------------------------------------------------------------------------------


def test_a_bundle_says_what_the_qformer_reads(result: BuildResult, whole_checkpoint: Path) -> None:
    manifest = result.manifest
    assert manifest.kind == "instructblip-opt"
    assert manifest.qformer.instruction is not None
    assert manifest.qformer.instruction.model_dump() == {
        "vocab_size": QFORMER_VOCAB_SIZE,
        "max_tokens": QFORMER_POSITIONS,
        "pad_token_id": 0,
    }
    assert manifest.generation.empty_prompt_ids == (2,)
    folder = result.bundle / BLIP2 / MODEL_VERSION
    assert f"{BLIP2}/{MODEL_VERSION}/qformer_tokenizer.json" in manifest.files
    encoder, processor = InstructionEncoder.load(folder, manifest), open_checkpoint(str(whole_checkpoint)).processor
    assert encoder is not None
    for text in TEXTS:
        assert list(encoder.encode(text)) == processor(text=text)["qformer_input_ids"][0]


def test_the_report_covers_every_prompt(result: BuildResult) -> None:
    assert {stage.stage for stage in result.parity.stages} >= {"vision_encoder", "qformer", "decoder step"}
    assert {(text.image, text.prompt) for text in result.parity.texts} >= {(0, ""), (3, "")}
    assert all(text.expected == text.found for text in result.parity.texts)


def test_the_graph_has_the_tensors_of_the_contract(result: BuildResult) -> None:
    def expected(tensor: TensorSpec) -> tuple[str, type[np.generic], tuple[str | int, ...]]:
        dtype = {"FP32": np.float32, "INT64": np.int64}[tensor.dtype]
        shape = ("sequence",) if tensor.ragged else result.manifest.shape(tensor)
        return tensor.name, dtype, ("batch", *shape)

    path = result.bundle / QFORMER / MODEL_VERSION / GRAPH_FILE
    with create_engine("onnxruntime", path, threads=1) as engine:
        for infos, tensors in (
            (engine.inputs, INSTRUCTED_QFORMER_SPEC.inputs),
            (engine.outputs, INSTRUCTED_QFORMER_SPEC.outputs),
        ):
            assert [(info.name, info.dtype, info.shape) for info in infos] == [expected(tensor) for tensor in tensors]
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert {"MultiHeadAttention", "LayerNormalization", "Gelu", "Gemm"} <= operators
    assert not {"MatMul", "Softmax"} & operators


@pytest.mark.parametrize("lengths", [(1,), (7,), (3, 40, 1), (2, 2, 9, 33)], ids=str)
def test_padded_batches_equal_transformers(lengths: tuple[int, ...], result: BuildResult) -> None:
    """Each instruction by itself in transformers, all of them in one padded batch of the graph."""
    generator = torch.Generator().manual_seed(sum(lengths))
    model, section = make_instructblip(), result.manifest.qformer.instruction
    assert section is not None
    pixel_values = torch.randn(len(lengths), 3, 28, 28, generator=generator)
    instructions = [torch.randint(0, 150, (length,), generator=generator) for length in lengths]
    with torch.no_grad():
        features = [model.get_image_features(pixel_values[[row]], ids[None]) for row, ids in enumerate(instructions)]
    embeds = torch.cat([alone.last_hidden_state for alone in features]).numpy()
    batch = pad_instructions([instruction_inputs(ids.tolist()) for ids in instructions], section)
    with create_engine("onnxruntime", result.bundle / QFORMER / MODEL_VERSION / GRAPH_FILE, threads=1) as engine:
        found = engine.run({IMAGE_EMBEDS.name: embeds, **batch})[SOFT_TOKENS.name]
    expected = torch.cat([alone.pooler_output for alone in features]).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5 * np.abs(expected).max())


# --- old checkpoints -------------------------------------------------------------------------------------------------


def make_old(folder: Path) -> None:
    """As first published: without the placeholder's id and the number of queries, on both sides."""
    edit("config.json", lambda config: (config.pop("image_token_index"), config.pop("num_query_tokens")))(folder)
    edit("processor_config.json", lambda config: config.pop("num_query_tokens"))(folder)


def test_an_old_configuration_is_completed(checkpoint: Path, whole_checkpoint: Path) -> None:
    make_old(checkpoint)
    old, new = open_checkpoint(str(checkpoint)), open_checkpoint(str(whole_checkpoint))
    check_tokenizer(old)
    for opened in (old, new):
        assert (opened.config.num_query_tokens, opened.config.image_token_index) == (6, 319)
        assert opened.processor.num_query_tokens == 6
    texts = [
        compute_reference(load_model(opened), opened, opened.decoder_section(max_sequences=1, max_tokens=48)).texts
        for opened in (old, new)
    ]
    assert [text.token_ids for text in texts[0]] == [text.token_ids for text in texts[1]]


def test_an_old_checkpoint_without_room_for_the_placeholder(tmp_path: Path) -> None:
    tokenizer = opt_tokenizer(image_token=False)
    model = make_instructblip("opt", len(tokenizer), 5)
    model.save_pretrained(tmp_path / "checkpoint")
    processor = make_instructblip_processor(tokenizer, make_qformer_tokenizer(), TinySizes())
    processor.save_pretrained(tmp_path / "checkpoint")
    make_old(tmp_path / "checkpoint")
    result = build(str(tmp_path / "checkpoint"), tmp_path / "bundle", BuildOptions(max_sequences=2))
    assert result.manifest.generation.image_token_id is None
    assert all(text.equal for text in result.parity.texts)


def test_no_begin_token_is_needed(checkpoint: Path) -> None:
    """An empty prompt is what the processor makes of an empty text, and that needs no ``bos_token_id``."""
    put(text_config__bos_token_id=None)(checkpoint)
    opened = open_checkpoint(str(checkpoint))
    assert generation_section(load_model(opened), opened).empty_prompt_ids == (2,)


# --- videos ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def video_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_instructblipvideo(tmp_path_factory.mktemp("instructblipvideo") / "random")


def test_a_bundle_for_videos(video_checkpoint: Path, tmp_path: Path) -> None:
    """Four frames a text; the report holds what the checkpoint makes of all of them together."""
    result = build(str(video_checkpoint), tmp_path / "bundle", BuildOptions(max_sequences=2))
    manifest = result.manifest
    assert (manifest.kind, manifest.vision.num_frames) == ("instructblipvideo-opt", 4)
    assert manifest.image.size == 28
    assert manifest.generation.image_token_id == 320
    assert all(text.expected == text.found for text in result.parity.texts)
    assert len({text.expected for text in result.parity.texts}) == len(result.parity.texts)


def test_videos_have_as_many_placeholders_as_soft_tokens(video_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(video_checkpoint))
    ids = processor_ids(checkpoint, "a red cat")
    assert ids[:24] == [320] * 24 == [checkpoint.placeholder_id] * checkpoint.num_soft_tokens
    assert ids[24:] == checkpoint.processor.tokenizer("a red cat")["input_ids"]


VIDEO_FAULTS: dict[str, tuple[Fault, type[Exception], str]] = {
    "narrow embeddings": (
        put(text_config__word_embed_proj_dim=20),
        UnsupportedCheckpointError,
        "embeddings of width 20 under a hidden state of 48, and with several frames only equal widths are served",
    ),
    "no transform": (
        edit("processor_config.json", lambda config: config.pop("video_processor")),
        CheckpointError,
        "does not say how a frame is resized, in processor_config.json, video_preprocessor_config.json, preprocessor_c",
    ),
    "no processor": (
        remove("processor_config.json"),
        CheckpointError,
        "holds no video processor: expected one of processor_config.json, video_preprocessor_config.json",
    ),
    "another placeholder": (
        put(video_token_index=3),
        CheckpointError,
        "<video> has id 320, and the configuration has video_token_index = 3",
    ),
    "frames of another size": (
        edit("processor_config.json", lambda config: config["video_processor"].update(size={"height": 9, "width": 9})),
        CheckpointError,
        "and the vision encoder reads 28 x 28",
    ),
}


@pytest.mark.parametrize("name", VIDEO_FAULTS)
def test_faults_of_checkpoints_for_videos(name: str, video_checkpoint: Path, tmp_path: Path) -> None:
    fault, error, message = VIDEO_FAULTS[name]
    folder = Path(shutil.copytree(video_checkpoint, tmp_path / "checkpoint"))
    fault(folder)
    with pytest.raises(error, match=message):
        build(str(folder), tmp_path / "bundle")


def test_capacity_counts_the_soft_tokens_of_every_frame(video_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="leaves no room for text behind 24 soft tokens: expected at least 26"):
        build(str(video_checkpoint), tmp_path / "bundle", BuildOptions(max_tokens=25))


# --- faults ----------------------------------------------------------------------------------------------------------


def larger_qformer_tokenizer(folder: Path) -> None:
    tokenizer = make_qformer_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(QFORMER_VOCAB_SIZE - len(tokenizer) + 1)])
    tokenizer.save_pretrained(folder / "qformer_tokenizer")


FAULTS: dict[str, tuple[Fault, type[CheckpointError], str]] = {
    "another language model": (
        put(text_config__model_type="gpt2"),
        UnsupportedCheckpointError,
        r"\(model_type 'instructblip', architecture InstructBlipForConditionalGeneration, language model 'gpt2'\); it "
        r"serves Blip2ForConditionalGeneration, InstructBlipForConditionalGeneration",
    ),
    "another class": (
        put(architectures=["InstructBlipModel"]),
        UnsupportedCheckpointError,
        "architecture InstructBlipModel",
    ),
    "no tokenizer of the Q-Former": (
        remove("qformer_tokenizer/tokenizer.json"),
        CheckpointError,
        "holds no tokenizer of the Q-Former: expected one of qformer_tokenizer/tokenizer.json, qformer_tokenizer/vocab",
    ),
    "a damaged tokenizer of the Q-Former": (
        cut("qformer_tokenizer/tokenizer.json", lambda size: size // 2),
        CheckpointError,
        "the tokenizer of the Q-Former in .*/qformer_tokenizer cannot be loaded",
    ),
    "a larger tokenizer of the Q-Former": (
        larger_qformer_tokenizer,
        CheckpointError,
        r"the Q-Former's tokenizer of .* is not that of its Q-Former: token '<.*>' has id 150, and the Q-Former's "
        r"vocab_size is 150",
    ),
    "fewer positions than the weights have": (
        put(qformer_config__max_position_embeddings=39),
        CheckpointError,
        r"the tensor qformer.embeddings.position_embeddings.weight of .* has shape \(40, 40\), and its configuration",
    ),
    "another number of placeholders": (
        edit("processor_config.json", lambda config: config.update(num_query_tokens=7)),
        CheckpointError,
        "the processor of .* declares num_query_tokens = 7, but the tensor query_tokens holds 6",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_one_sentence_and_leaves_nothing(name: str, checkpoint: Path, tmp_path: Path) -> None:
    fault, error, message = FAULTS[name]
    fault(checkpoint)
    with pytest.raises(error, match=message) as raised:
        build(str(checkpoint), tmp_path / "bundle")
    assert type(raised.value) is error
    assert "\n" not in str(raised.value)
    assert not str(raised.value).endswith(".")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_the_tokenizer_must_give_the_ids_of_the_processor(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_checkpoint(str(checkpoint))
    check_qformer_tokenizer(opened)

    def add_a_token(_self: object, text: list[str], **_options: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[2, 9, 3] for _ in text], "attention_mask": [[1, 1, 1] for _ in text]}

    monkeypatch.setattr(type(opened.processor.qformer_tokenizer), "__call__", add_a_token)
    with pytest.raises(
        CheckpointError, match=r"the qformer_tokenizer.json of .* does not give the ids of InstructBlip"
    ):
        check_qformer_tokenizer(opened)
