"""Opening a checkpoint, of any age and from anywhere, and the defaults of its ``generate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from blipstream_export.build import BuildOptions, build
from blipstream_export.checkpoint import Checkpoint, load_model, open_checkpoint
from blipstream_export.generation import empty_prompt_ids, generation_notes, generation_section
from blipstream_export.reference import compute_reference
from blipstream_export.tokenizer import check_tokenizer, tokenizer_notes
from blipstream_export.weights import INDEX_FILE
from safetensors.torch import load_file

from blipstream.errors import BundleError, CheckpointError, UnsupportedCheckpointError
from blipstream.manifest import DecoderSection
from tests.export.damage import (
    Fault,
    both,
    copy,
    edit,
    move,
    processor,
    put,
    remove,
    rename,
    shard,
    shards,
    weights,
    write,
)
from tests.support.checkpoints import TinySizes, make_blip2_opt, make_images, make_processor, save_blip2, save_blip2_opt
from tests.support.languages import opt_tokenizer

DECODER = "language_model.model.decoder"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"precision": "fp8"},
            UnsupportedCheckpointError,
            "precision 'fp8' is not built for onnxruntime: expected one of fp32",
        ),
        ({"max_sequences": 0}, BundleError, "max_sequences must be at least 1, but it is 0"),
        ({"question_template": "Q:"}, BundleError, r"template must hold \{\} exactly once, but it is 'Q:'"),
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


def test_shards_load_like_one_file(random_checkpoint: Path, tmp_path: Path) -> None:
    folder = save_blip2_opt(tmp_path / "sharded", max_shard_size="100KB")
    assert (folder / "model.safetensors.index.json").is_file()
    one, many = (load_model(open_checkpoint(str(path))).state_dict() for path in (random_checkpoint, folder))
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def _with_vocabulary_files(folder: Path) -> None:
    """As GPT-2's tokenizer was saved before there was ``tokenizer.json``."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{' '.join(pair)}\n" for pair in model["merges"]))
    (folder / "tokenizer.json").unlink()
    edit("tokenizer_config.json", lambda config: config.update(tokenizer_class="GPT2Tokenizer"))(folder)


def _with_preprocessor_config(folder: Path) -> None:
    contents = json.loads((folder / "processor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(contents.pop("image_processor")))
    (folder / "processor_config.json").write_text(json.dumps(contents))


def _beside(index: dict[str, Any]) -> None:
    places = index["weight_map"]
    places.update({name: f"../other/{file}" for name, file in places.items() if file.startswith("model-00001-")})


ACCEPTED: dict[str, tuple[Fault, str]] = {
    "weights of another name": (rename("model.safetensors", "blip2.safetensors"), "found by the names of the files"),
    "shards without an index": (shards(remove("model.safetensors.index.json")), "found by the names of the files"),
    "a whole file beside an old index": (
        write("model.safetensors.index.json", b'{"weight_map": {"x": "model-00001-of-00002.safetensors"}}'),
        "model.safetensors.index.json beside it is not read, as in transformers",
    ),
    "a whole file beside old shards": (
        both(copy("model.safetensors", "whole"), shards(lambda _: None), rename("whole", "model.safetensors")),
        "model.safetensors.index.json beside it is not read, as in transformers",
    ),
    "fp16 by an old name": (edit("config.json", lambda config: config.update(torch_dtype=config.pop("dtype"))), ""),
    "shards in a folder beside": (
        shards(lambda folder: both(move(shard(folder, 0).name, "../other"), edit(INDEX_FILE, _beside))(folder)),
        "",
    ),
    "a tied weight twice": (
        weights(lambda t: t.update({"language_model.lm_head.weight": t[f"{DECODER}.embed_tokens.weight"].clone()})),
        "",
    ),
    "tensors besides": (weights(lambda t: t.update({"qformer.embeddings.position_ids": torch.arange(5)[None]})), ""),
    "vocab.json and merges.txt": (_with_vocabulary_files, ""),
    "preprocessor_config.json": (_with_preprocessor_config, ""),
    "the fast image processor": (processor(image_processor_type="BlipImageProcessorFast", device="cuda"), ""),
    "no generation_config.json": (remove("generation_config.json"), ""),
    "no architectures": (edit("config.json", lambda config: config.pop("architectures")), ""),
    "no language model's type": (edit("config.json", lambda config: config["text_config"].pop("model_type")), ""),
    "fields of old releases": (
        put(use_decoder_only_language_model=True, text_config___name_or_path="x/y", text_config__pruned_heads={}),
        "",
    ),
    "Windows line ends": (
        lambda folder: write("config.json", (folder / "config.json").read_bytes().replace(b"\n", b"\r\n"))(folder),
        "",
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_checkpoints_as_people_have_them(name: str, checkpoint: Path, random_checkpoint: Path) -> None:
    change, note = ACCEPTED[name]
    change(checkpoint)
    opened = open_checkpoint(str(checkpoint))
    check_tokenizer(opened)
    assert note in " ".join(opened.notes) if note else not opened.notes
    expected = load_file(random_checkpoint / "model.safetensors")
    found = load_model(opened).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("below", "message"),
    [
        ("model.safetensors", r"is a file, but a checkpoint is a folder in the .*: did you mean .*/checkpoint\?$"),
        ("..", r"holds no config.json: did you mean .*/checkpoint\?$"),
        ("qformer_tokenizer", r"holds no config.json: did you mean .*/checkpoint\?$"),
    ],
)
def test_a_path_beside_the_checkpoint(below: str, message: str, checkpoint: Path) -> None:
    (checkpoint / "qformer_tokenizer").mkdir()
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(checkpoint / below))
    with pytest.raises(CheckpointError, match=r"a revision \(v1\) belongs to a hub id, and .* is a folder"):
        open_checkpoint(str(checkpoint), revision="v1")


def test_names_that_are_not_ascii(checkpoint: Path) -> None:
    folder = checkpoint.rename(checkpoint.with_name("ünï cøde 日本 $(x)"))
    assert open_checkpoint(str(folder)).name == folder.name


@pytest.mark.parametrize("side", [224, 364])
def test_images_are_resized_by_pillow_beside_torchvision(
    side: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers finds a torchvision; what it would load for it is a class that stands for its form."""
    import transformers
    from transformers.models.auto import image_processing_auto as auto

    class Torchvision(transformers.BlipImageProcessorPil):
        pass

    load = auto.get_image_processor_class_from_name
    monkeypatch.setattr(auto, "is_torchvision_available", lambda: True)
    monkeypatch.setattr(
        auto,
        "get_image_processor_class_from_name",
        lambda name: Torchvision if name == "BlipImageProcessor" else load(name),
    )
    monkeypatch.setattr(transformers, "BlipImageProcessor", Torchvision)
    both(put(vision_config__image_size=side), processor(size={"height": side, "width": side}))(checkpoint)
    images = open_checkpoint(str(checkpoint)).processor.image_processor
    assert type(images) is transformers.BlipImageProcessorPil
    assert images(make_images(1), return_tensors="np")["pixel_values"].shape == (1, 3, side, side)
    assert type(transformers.Blip2Processor.from_pretrained(checkpoint).image_processor) is Torchvision


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
    texts = [compute_reference(load_model(opened), opened, sizes(opened)).texts for opened in (old, new)]
    assert [text.token_ids for text in texts[0]] == [text.token_ids for text in texts[1]]


def test_old_checkpoint_without_room_for_the_placeholder(tmp_path: Path) -> None:
    """As first published: no ``<image>`` in the tokenizer, and no row for it in the language model."""
    tokenizer = opt_tokenizer(image_token=False)
    model = make_blip2_opt(len(tokenizer), image_token_id=5)
    model.save_pretrained(tmp_path)
    make_processor(tokenizer, TinySizes()).save_pretrained(tmp_path)
    _make_old(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.config.image_token_index is None
    assert "<image>" in checkpoint.processor.tokenizer.get_vocab()  # the processor adds it, behind the last id
    check_tokenizer(checkpoint)
    loaded = load_model(checkpoint)
    assert generation_section(loaded, checkpoint).image_token_id is None
    reference = compute_reference(loaded, checkpoint, sizes(checkpoint))

    # The same weights with any other id as the placeholder generate the same.
    pixel_values = torch.from_numpy(reference.pixel_values)
    model.config.image_token_index = 5
    for text in reference.texts:
        assert 5 not in text.prompt_ids
        input_ids = torch.tensor([[5] * 6 + list(text.prompt_ids)])
        tokens = model.generate(
            pixel_values=pixel_values[list(text.images)],
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
    opened = open_checkpoint(str(checkpoint))
    model = load_model(opened)
    section = generation_section(model, opened)
    assert section.model_dump() == {
        "empty_prompt_ids": (2,),
        "eos_token_ids": (2, 9),
        "pad_token_id": 1,
        "image_token_id": 319,
        "max_new_tokens": 20,
        "repetition_penalty": 1.0,
        "question_template": "Question: {} Answer:",
    }
    own = 'Frage: {} "Antwort"\\:'
    assert generation_section(model, opened, question_template=own).question_template == own
    assert generation_notes(model, opened) == []


def test_generation_config_that_generate_does_not_read_is_pointed_out(checkpoint: Path) -> None:
    edit("generation_config.json", lambda config: config.update(num_beams=5, max_new_tokens=3))(checkpoint)
    opened = open_checkpoint(str(checkpoint))
    model = load_model(opened)
    assert generation_section(model, opened).max_new_tokens == 20
    (note,) = generation_notes(model, opened)
    assert note.startswith("generation_config.json asks for num_beams = 5, max_new_tokens = 3, which the checkpoint's")
    images = opened.processor(images=make_images(1), return_tensors="pt")
    with pytest.warns(UserWarning, match="model-agnostic default `max_length`"):
        assert model.generate(**images).shape[1] > 7 + 3  # what is claimed of generate is so


def test_defaults_that_a_bundle_cannot_hold_are_pointed_out(random_checkpoint: Path) -> None:
    opened = open_checkpoint(str(random_checkpoint))
    model = load_model(opened)
    model.language_model.generation_config.update(num_beams=4, repetition_penalty=1.5, max_new_tokens=30)
    section = generation_section(model, opened)
    assert (section.repetition_penalty, section.max_new_tokens) == (1.5, 30)
    (note,) = generation_notes(model, opened)
    assert note.startswith("the language model's defaults ask for num_beams = 4, which the bundle does not carry")


def test_a_tokenizer_that_has_other_special_tokens_is_pointed_out(checkpoint: Path) -> None:
    """As that of the public InstructBLIP with Vicuna; what the processor gives counts."""
    assert tokenizer_notes(open_checkpoint(str(checkpoint))) == []
    edit("tokenizer_config.json", lambda config: config.update(bos_token="<s>"))(checkpoint)
    (note,) = tokenizer_notes(open_checkpoint(str(checkpoint)))
    assert note.startswith("the tokenizer's bos_token has id 0, and the language model's bos_token_id is 2; each is")


def test_a_configuration_that_transformers_refuses_is_explained(tmp_path: Path) -> None:
    folder = save_blip2(tmp_path / "checkpoint", "llama")
    put(text_config__head_dim=9)(folder)
    with pytest.raises(
        CheckpointError, match=r"cannot be loaded: .* requires an even rotary dimension, but got"
    ) as raised:
        open_checkpoint(str(folder))
    assert "\n" not in str(raised.value)


def test_an_old_configuration_writes_minus_one_for_no_token(tmp_path: Path) -> None:
    folder = save_blip2(tmp_path / "checkpoint", "llama", text={"pad_token_id": -1})
    opened = open_checkpoint(str(folder))
    assert generation_section(load_model(opened), opened).pad_token_id is None
    put(text_config__pad_token_id=340)(folder)
    with pytest.raises(CheckpointError, match=r"pad_token_id = 340 of .* is outside the language model's vocab"):
        open_checkpoint(str(folder))


def test_t5_without_a_begin_token_captions_from_the_tokens_of_an_empty_text(tmp_path: Path) -> None:
    """Flan-T5 in BLIP-2 has a ``bos_token_id``; T5 by itself has none, and ``generate`` fails without a prompt."""
    with_one = open_checkpoint(str(save_blip2(tmp_path / "with", "t5", text={"bos_token_id": 9})))
    without = open_checkpoint(str(save_blip2(tmp_path / "without", "t5", text={"bos_token_id": None})))
    assert (empty_prompt_ids(with_one), empty_prompt_ids(without)) == ((9,), (1,))
    models = [load_model(opened) for opened in (with_one, without)]
    assert generation_notes(models[0], with_one) == []
    (note,) = generation_notes(models[1], without)
    assert note.endswith("here, a caption begins with the tokens of an empty text, [1]")
    images = without.processor(images=make_images(1), return_tensors="pt")
    with pytest.raises(TypeError, match="NoneType"):
        models[1].generate(**images)  # what is claimed of generate is so
    caption = compute_reference(models[1], without, sizes(without)).texts[0]
    assert (caption.prompt, caption.prompt_ids) == ("", (1,))
    assert compute_reference(models[0], with_one, sizes(with_one)).texts[0].prompt_ids == (9,)


def test_prompts_of_t5_need_no_room_for_the_answer(tmp_path: Path) -> None:
    opened = open_checkpoint(str(save_blip2(tmp_path / "checkpoint", "t5")))
    model = load_model(opened)
    short = opened.decoder_section(max_sequences=1, max_tokens=13)
    lengths = [len(text.prompt_ids) + 6 for text in compute_reference(model, opened, short).texts]
    assert max(lengths) <= 13
    assert len(set(lengths)) > 1
    tokens = [len(text.token_ids) for text in compute_reference(model, opened, short).texts]
    assert max(tokens) == 13  # the answer has 13 tokens, however long the prompt


def test_defaults_that_a_bundle_cannot_hold_are_left_out_of_the_comparison(tmp_path: Path) -> None:
    opened = open_checkpoint(str(save_blip2(tmp_path / "checkpoint", "t5")))
    model = load_model(opened)
    plain = [text.token_ids for text in compute_reference(model, opened, sizes(opened)).texts]
    model.language_model.generation_config.update(forced_bos_token_id=50, no_repeat_ngram_size=1)
    (note,) = generation_notes(model, opened)
    assert "ask for no_repeat_ngram_size = 1, forced_bos_token_id = 50, which the bundle does not carry" in note
    assert [text.token_ids for text in compute_reference(model, opened, sizes(opened)).texts] == plain


def sizes(checkpoint: Checkpoint) -> DecoderSection:
    return checkpoint.decoder_section(max_sequences=1, max_tokens=48)


def _make_old(folder: Path) -> None:
    edit("config.json", lambda config: (config.pop("image_token_index"), config.pop("num_query_tokens")))(folder)
    edit("processor_config.json", lambda config: config.pop("num_query_tokens"))(folder)
