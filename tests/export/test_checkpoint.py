"""Opening a checkpoint: what is wrong with it is said in one sentence, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blipstream_export.build import BuildOptions, build
from blipstream_export.checkpoint import load_model, open_checkpoint
from blipstream_export.generation import generation_notes, generation_section
from blipstream_export.reference import compute_reference
from blipstream_export.tokenizer import check_tokenizer
from safetensors.torch import load_file, save_file

from blipstream.errors import BundleError, CheckpointError, UnsupportedCheckpointError
from tests.checkpoints import TinySizes, make_blip2_opt, make_images, make_processor, make_tokenizer, save_blip2_opt

Fault = Callable[[Path], None]


@pytest.fixture
def checkpoint(random_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(random_checkpoint, tmp_path / "checkpoint"))


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Fault:
    def fault(folder: Path) -> None:
        contents = json.loads((folder / name).read_text())
        change(contents)
        (folder / name).write_text(json.dumps(contents))

    return fault


def put(**values: Any) -> Fault:
    """Set fields of config.json; a name such as text_config__vocab_size reaches into a section."""

    def change(config: dict[str, Any]) -> None:
        for name, value in values.items():
            *sections, field = name.split("__")
            target = config
            for section in sections:
                target = target[section]
            target[field] = value

    return edit("config.json", change)


def processor(**values: Any) -> Fault:
    return edit("processor_config.json", lambda config: config["image_processor"].update(values))


def remove(*names: str) -> Fault:
    def fault(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return fault


def cut(name: str, keep: Callable[[int], int]) -> Fault:
    def fault(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: keep(len(data))])

    return fault


def write(name: str, data: bytes) -> Fault:
    return lambda folder: (folder / name).write_bytes(data) and None


def append(name: str, tail: bytes) -> Fault:
    return lambda folder: write(name, (folder / name).read_bytes() + tail)(folder)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Fault:
    def fault(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return fault


def shards(then: Fault) -> Fault:
    """Save the checkpoint in shards instead, and damage it then."""

    def fault(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        make_blip2_opt().save_pretrained(folder, max_shard_size="100KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 2
        then(folder)

    return fault


def other_tokenizer(**fields: Any) -> Fault:
    def fault(folder: Path) -> None:
        tokenizer = make_tokenizer(**fields)
        make_processor(tokenizer, TinySizes()).save_pretrained(folder)

    return fault


def shard(folder: Path, number: int) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[number]


FAULTS: dict[str, tuple[Fault, type[CheckpointError], str]] = {
    # --- of a kind that is not served
    "another model": (
        put(model_type="llava", architectures=["LlavaForConditionalGeneration"]),
        UnsupportedCheckpointError,
        r"a kind that Blipstream does not serve \(model_type 'llava', architecture LlavaForConditionalGeneration.*"
        r"it serves Blip2ForConditionalGeneration with a language model of type 'opt'",
    ),
    "another architecture": (
        put(architectures=["Blip2ForImageTextRetrieval"]),
        UnsupportedCheckpointError,
        "architecture Blip2ForImageTextRetrieval",
    ),
    "another language model": (
        put(text_config__model_type="t5"),
        UnsupportedCheckpointError,
        "language model 't5'",
    ),
    "no begin token": (put(text_config__bos_token_id=None), UnsupportedCheckpointError, "has no bos_token_id"),
    "embeddings wider than the hidden state": (
        put(text_config__word_embed_proj_dim=60),
        UnsupportedCheckpointError,
        "embeddings of width 60, wider than its hidden state of 48",
    ),
    "images cropped": (processor(do_center_crop=True), UnsupportedCheckpointError, "do_center_crop = true"),
    "images not normalised": (processor(do_normalize=False), UnsupportedCheckpointError, "do_normalize = false"),
    "an unknown filter": (processor(resample=5), UnsupportedCheckpointError, "resamples by filter 5"),
    # --- files missing or damaged
    "no configuration": (remove("config.json"), CheckpointError, "holds no config.json"),
    "configuration cut short": (cut("config.json", lambda size: size // 2), CheckpointError, "is not valid JSON"),
    "configuration a list": (write("config.json", b"[]"), CheckpointError, "must hold a JSON object, but it holds a l"),
    "impossible configuration": (put(vision_config__patch_size="x"), CheckpointError, "config.json cannot be loaded"),
    "no weights": (
        remove("model.safetensors"),
        CheckpointError,
        "holds no weights: expected model.safetensors or model.safetensors.index.json",
    ),
    "pickled weights": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin") and None,
        CheckpointError,
        "holds its weights as pytorch_model.bin, and Blipstream reads safetensors",
    ),
    "weights truncated": (
        cut("model.safetensors", lambda size: size - 1),
        CheckpointError,
        r"model.safetensors is truncated: it holds \d+ bytes, and its header declares \d+",
    ),
    "weights truncated in the header": (
        cut("model.safetensors", lambda _: 100),
        CheckpointError,
        "truncated: it ends within its header, after 100 bytes",
    ),
    "weights empty": (cut("model.safetensors", lambda _: 0), CheckpointError, "truncated: it holds 0 bytes"),
    "weights with a tail": (
        append("model.safetensors", b"x"),
        CheckpointError,
        "is damaged: it holds",
    ),
    "weights of another format": (
        write("model.safetensors", b"PK\x03\x04 a pickle of torch"),
        CheckpointError,
        r"is not a safetensors file: it declares a header of \d+ bytes",
    ),
    "weights with a broken header": (
        write("model.safetensors", (2).to_bytes(8, "little") + b"[]"),
        CheckpointError,
        "is not a safetensors file: its header cannot be read",
    ),
    "a shard missing": (
        shards(lambda folder: shard(folder, 1).unlink()),
        CheckpointError,
        r"lacks the shard model-00002-of-\d+.safetensors, one of \d+ that its index names",
    ),
    "a shard truncated": (
        shards(lambda folder: cut(shard(folder, -1).name, lambda size: size - 4000)(folder)),
        CheckpointError,
        r"model-\d+-of-\d+.safetensors is truncated",
    ),
    "a shard of another model": (
        shards(lambda folder: shutil.copy(shard(folder, 0), shard(folder, 1)) and None),
        CheckpointError,
        r"the shard .* lacks the tensor .*, which the index places there",
    ),
    "an empty index": (
        shards(write("model.safetensors.index.json", b"{}")),
        CheckpointError,
        "has no weight_map",
    ),
    # --- contents that do not fit together
    "a tensor missing": (
        weights(lambda tensors: tensors.pop("language_projection.weight")),
        CheckpointError,
        "lacks the tensor language_projection.weight that its configuration asks for",
    ),
    "tensors missing": (
        put(text_config__num_hidden_layers=3),
        CheckpointError,
        r"lacks 16 tensors \(language_model.model.decoder.layers.2.fc1.bias, .*, ...\)",
    ),
    "a tensor of another shape": (
        put(text_config__ffn_dim=81),
        CheckpointError,
        r"the tensor language_model.model.decoder.layers.0.fc1.bias of .* has shape \(80,\), and its configuration "
        r"asks for \(81,\) \(and \d+ more\)",
    ),
    "no query tokens": (
        weights(lambda tensors: tensors.pop("query_tokens")),
        CheckpointError,
        "lacks the tensor query_tokens",
    ),
    "another number of query tokens": (
        put(num_query_tokens=32),
        CheckpointError,
        "declares num_query_tokens = 32, but the tensor query_tokens holds 6",
    ),
    "another number of placeholders": (
        edit("processor_config.json", lambda config: config.update(num_query_tokens=7)),
        CheckpointError,
        "the processor of .* declares num_query_tokens = 7, but the tensor query_tokens holds 6",
    ),
    "images of another size": (
        processor(size={"height": 32, "width": 32}),
        CheckpointError,
        "and the vision encoder reads 28 x 28",
    ),
    # --- a wrong tokenizer
    "no tokenizer": (
        remove("tokenizer.json", "tokenizer_config.json"),
        CheckpointError,
        "holds no tokenizer: expected one of tokenizer.json, vocab.json",
    ),
    "a damaged tokenizer": (
        cut("tokenizer.json", lambda size: size // 2),
        CheckpointError,
        "the tokenizer and image processor of .* cannot be loaded",
    ),
    "no image processor": (
        remove("processor_config.json"),
        CheckpointError,
        "holds no image processor: expected one of processor_config.json, preprocessor_config.json",
    ),
    "a larger tokenizer": (
        other_tokenizer(vocab_size=330),
        CheckpointError,
        r"is not that of its language model: token '<image>' has id 329, and the language model's vocab_size is 320",
    ),
    "a tokenizer of other ids": (
        edit("tokenizer_config.json", lambda config: config.update(bos_token="<s>")),
        CheckpointError,
        "its bos_token has id 0, and the language model's bos_token_id is 2",
    ),
    "a tokenizer with another placeholder": (
        put(image_token_index=317),
        CheckpointError,
        "<image> has id 319, and the configuration has image_token_index = 317",
    ),
    "an end token outside the vocabulary": (
        put(text_config__eos_token_id=[2, 320]),
        CheckpointError,
        r"eos_token_id = \[2, 320\] is outside the language model's vocabulary of 320 tokens",
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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precision": "fp16"}, UnsupportedCheckpointError, "precision 'fp16' is not built: expected one of fp32"),
        ({"max_sequences": 0}, BundleError, "max_sequences must be at least 1, but it is 0"),
        ({"max_tokens": -1}, BundleError, "max_tokens must be at least 1, but it is -1"),
    ],
)
def test_options_are_refused_before_any_work(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BuildOptions(**options)


@pytest.mark.parametrize(
    ("max_tokens", "message"),
    [
        (161, "max_tokens = 161 is more than the language model reads: it has 160 positions"),
        (7, "max_tokens = 7 leaves no room for text behind 6 soft tokens: expected at least 8"),
    ],
)
def test_capacity_must_fit_the_model(max_tokens: int, message: str, random_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=message):
        build(str(random_checkpoint), tmp_path / "bundle", BuildOptions(max_tokens=max_tokens))
    assert not list(tmp_path.iterdir())


def test_a_source_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file is a file, but a checkpoint is a folder"):
        open_checkpoint(str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="there is no folder /no/such/folder, and a hub id would read owner/name"):
        open_checkpoint("/no/such/folder")


def test_hub_id_is_downloaded(random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked.append((repo_id, allow_patterns))
        return str(random_checkpoint)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    checkpoint = open_checkpoint("owner/tiny-blip2")
    assert checkpoint.name == "owner/tiny-blip2"
    assert asked[0][0] == "owner/tiny-blip2"
    assert not any("bin" in pattern for pattern in asked[0][1])


def test_hub_id_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="there is no folder owner/nothing, and the hub did not give") as raised:
        open_checkpoint("owner/nothing")
    assert "\n" not in str(raised.value)


def test_shards_load_like_one_file(random_checkpoint: Path, tmp_path: Path) -> None:
    folder = save_blip2_opt(tmp_path / "sharded", max_shard_size="100KB")
    assert (folder / "model.safetensors.index.json").is_file()
    one, many = (load_model(open_checkpoint(str(path))).state_dict() for path in (random_checkpoint, folder))
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_half_precision_weights_load_in_fp32(checkpoint: Path) -> None:
    weights(lambda tensors: tensors.update({name: value.half() for name, value in tensors.items()}))(checkpoint)
    put(dtype="float16")(checkpoint)
    assert {parameter.dtype for parameter in load_model(open_checkpoint(str(checkpoint))).parameters()} == {
        torch.float32
    }


def test_old_configuration_is_completed(checkpoint: Path, random_checkpoint: Path) -> None:
    """Without image_token_index and num_query_tokens, on both sides: the framing is that of a new checkpoint."""
    _make_old(checkpoint)
    old, new = open_checkpoint(str(checkpoint)), open_checkpoint(str(random_checkpoint))
    check_tokenizer(old)
    for opened in (old, new):
        assert (opened.config.num_query_tokens, opened.config.image_token_index) == (6, 319)
        assert opened.processor.num_query_tokens == 6
    texts = [compute_reference(load_model(opened), opened, 48).texts for opened in (old, new)]
    assert [text.token_ids for text in texts[0]] == [text.token_ids for text in texts[1]]


def test_old_checkpoint_without_room_for_the_placeholder(tmp_path: Path) -> None:
    """As first published: no ``<image>`` in the tokenizer, and no row for it in the language model."""
    tokenizer = make_tokenizer(image_token=False)
    model = make_blip2_opt(len(tokenizer), image_token_id=5)
    model.save_pretrained(tmp_path)
    make_processor(tokenizer, TinySizes()).save_pretrained(tmp_path)
    _make_old(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.config.image_token_index is None
    assert "<image>" in checkpoint.processor.tokenizer.get_vocab()  # the processor adds it, behind the last id
    check_tokenizer(checkpoint)
    loaded = load_model(checkpoint)
    assert generation_section(loaded, image_token_id=None).image_token_id is None
    texts = compute_reference(loaded, checkpoint, 48).texts

    # The same weights with any other id as the placeholder generate the same.
    pixel_values = torch.from_numpy(compute_reference(loaded, checkpoint, 48).pixel_values)
    model.config.image_token_index = 5
    for text in texts:
        assert 5 not in text.prompt_ids
        input_ids = torch.tensor([[5] * 6 + list(text.prompt_ids)])
        tokens = model.generate(
            pixel_values=pixel_values[text.image : text.image + 1],
            input_ids=input_ids,
            max_new_tokens=min(20, 48 - input_ids.shape[1]),
        )
        assert tuple(tokens[0, input_ids.shape[1] :].tolist()) == text.token_ids


def test_tokenizer_must_give_the_ids_of_the_processor(random_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(random_checkpoint))
    checkpoint.processor.num_query_tokens += 1
    with pytest.raises(CheckpointError, match=r"does not give the ids of Blip2Processor: for 'a photo of' it gives \["):
        check_tokenizer(checkpoint)


# --- defaults of generate --------------------------------------------------------------------------------------------


def test_generation_defaults(checkpoint: Path) -> None:
    put(text_config__eos_token_id=[2, 9])(checkpoint)
    edit("generation_config.json", lambda config: config.update(eos_token_id=[2, 9]))(checkpoint)
    model = load_model(open_checkpoint(str(checkpoint)))
    section = generation_section(model, image_token_id=319)
    assert section.model_dump() == {
        "bos_token_id": 2,
        "eos_token_ids": (2, 9),
        "pad_token_id": 1,
        "image_token_id": 319,
        "max_new_tokens": 20,
        "repetition_penalty": 1.0,
    }
    assert generation_notes(model) == []


def test_generation_config_that_generate_does_not_read_is_pointed_out(checkpoint: Path) -> None:
    edit("generation_config.json", lambda config: config.update(num_beams=5, max_new_tokens=3))(checkpoint)
    opened = open_checkpoint(str(checkpoint))
    model = load_model(opened)
    assert generation_section(model, image_token_id=319).max_new_tokens == 20
    (note,) = generation_notes(model)
    assert note.startswith("generation_config.json asks for num_beams = 5, max_new_tokens = 3, which the checkpoint's")
    images = opened.processor(images=make_images(1), return_tensors="pt")
    with pytest.warns(UserWarning, match="model-agnostic default `max_length`"):
        assert model.generate(**images).shape[1] > 7 + 3  # what is claimed of generate is so


def test_defaults_that_a_bundle_cannot_hold_are_pointed_out(random_checkpoint: Path) -> None:
    model = load_model(open_checkpoint(str(random_checkpoint)))
    model.language_model.generation_config.update(num_beams=4, repetition_penalty=1.5, max_new_tokens=30)
    section = generation_section(model, image_token_id=319)
    assert (section.repetition_penalty, section.max_new_tokens) == (1.5, 30)
    (note,) = generation_notes(model)
    assert note.startswith("the language model's defaults ask for num_beams = 4, which the bundle does not carry")


def _make_old(folder: Path) -> None:
    edit("config.json", lambda config: (config.pop("image_token_index"), config.pop("num_query_tokens")))(folder)
    edit("processor_config.json", lambda config: config.pop("num_query_tokens"))(folder)
