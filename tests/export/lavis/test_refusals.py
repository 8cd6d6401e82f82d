"""What does not make a whole is refused in one sentence, before anything is computed, and nothing is left behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from blipstream_export.build import build
from blipstream_export.lavis.composition import LavisParts
from torch import Tensor
from typer.testing import CliRunner

from blipstream.cli import app
from blipstream.errors import CheckpointError, UnsupportedCheckpointError
from tests.support.lavis_parts import PartSizes, SavedParts, VitName, make_trained, make_vit, rewrite, save_parts

Change = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
Fault = Callable[[SavedParts], Any]


def trained(change: Change) -> Fault:
    return lambda parts: rewrite(parts.trained, change)


def vision(change: Change) -> Fault:
    return lambda parts: rewrite(parts.vision, change)


def without(*names: str) -> Change:
    """Leave out tensors, whose names must be there."""

    def change(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
        for name in names:
            del tensors[name]
        return tensors

    return change


def plus(**tensors: Tensor) -> Change:
    """Add tensors; ``__`` in a name stands for a dot."""
    return lambda own: own | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


def renamed(old: str, new: str) -> Change:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def configured(**fields: Any) -> Fault:
    """Change the language model's config.json."""

    def fault(parts: SavedParts) -> None:
        path = parts.llm / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return fault


def lost(name: str) -> Fault:
    """A file of the language model's folder is missing."""
    return lambda parts: (parts.llm / name).unlink()


def _first_stage(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
    return without("opt_proj.weight", "opt_proj.bias")(tensors | {"itm_head.weight": torch.zeros(2, 64)})


def _cross(layers: list[int]) -> Change:
    """Leave cross-attention in some layers alone."""

    def change(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
        donor = {name: tensor for name, tensor in tensors.items() if ".layer.0.crossattention." in name}
        plain = {name: tensor for name, tensor in tensors.items() if ".crossattention." not in name}
        added = [
            {name.replace(".layer.0.", f".layer.{layer}."): tensor for name, tensor in donor.items()}
            for layer in layers
        ]
        return plain | {name: tensor for part in added for name, tensor in part.items()}

    return change


LAYER = "Qformer.bert.encoder.layer"

FAULTS: dict[str, tuple[Fault, type[CheckpointError], str]] = {
    # --- the trained part
    "no trained part": (lambda parts: parts.trained.unlink(), CheckpointError, "blip2_trained.pth does not exist"),
    "the ViT in the place of the trained part": (
        lambda parts: parts.trained.write_bytes(parts.vision.read_bytes()),
        UnsupportedCheckpointError,
        "the trained part of .*blip2_trained.pth has no projection into a language model: expected one of opt_proj, "
        "t5_proj, llm_proj",
    ),
    "of the first stage": (
        trained(_first_stage),
        UnsupportedCheckpointError,
        r"has no projection into a language model \(it is of the first stage, which serves image-text retrieval\)",
    ),
    "two projections": (
        trained(plus(t5_proj__weight=torch.zeros(48, 64), t5_proj__bias=torch.zeros(48))),
        UnsupportedCheckpointError,
        "projects into several language models: opt_proj, t5_proj",
    ),
    "no query tokens": (
        trained(without("query_tokens")),
        CheckpointError,
        r"the trained part of .*blip2_trained.pth lacks the tensor query_tokens \(1, queries, width\)",
    ),
    "query tokens of another shape": (
        trained(lambda tensors: tensors | {"query_tokens": tensors["query_tokens"][0]}),
        CheckpointError,
        r"the tensor query_tokens of .*blip2_trained.pth has shape \(6, 64\), and \(1, queries, width\) was expected",
    ),
    "tensors missing": (
        trained(without(f"{LAYER}.1.output_query.dense.bias", "ln_vision.bias")),
        CheckpointError,
        rf"the trained part of .*trained.pth lacks 2 tensors \({LAYER}.1.output_query.dense.bias, ln_vision.bias\)",
    ),
    "a tensor missing": (
        trained(without("ln_vision.weight")),
        CheckpointError,
        "lacks the tensor ln_vision.weight$",
    ),
    "a tensor of another shape": (
        trained(plus(ln_vision__weight=torch.zeros(7), ln_vision__bias=torch.zeros(8))),
        CheckpointError,
        r"the tensor ln_vision.weight of .*blip2_trained.pth has shape \(7,\), and \(\d+,\) was expected \(and 1 more",
    ),
    "integers": (
        trained(lambda tensors: tensors | {"ln_vision.bias": tensors["ln_vision.bias"].long()}),
        CheckpointError,
        r"the tensor ln_vision.bias of .* has shape \(\d+,\) of torch.int64, and \(\d+,\) was expected",
    ),
    "a width that is no number of heads": (
        lambda parts: torch.save(_narrow(parts), parts.trained),
        UnsupportedCheckpointError,
        "has a Q-Former of width 63, no multiple of 64, which is BERT's size of a head and told by no tensor",
    ),
    "no cross-attention": (
        trained(_cross([])),
        CheckpointError,
        r"has 3 Q-Former layers with cross-attention in \[\], and it was expected in every n-th layer from the first",
    ),
    "cross-attention in odd places": (
        trained(_cross([1, 2])),
        CheckpointError,
        r"has 3 Q-Former layers with cross-attention in \[1, 2\]",
    ),
    "a language model within": (
        trained(plus(opt_model__lm_head__weight=torch.zeros(1), opt_model__x=torch.zeros(1))),
        UnsupportedCheckpointError,
        r"holds tensors of a language model \(opt_model.lm_head.weight and 1 more\), and Blipstream takes the language "
        "model from its own folder",
    ),
    # --- the ViT
    "no ViT": (lambda parts: parts.vision.unlink(), CheckpointError, "_vit.pth does not exist"),
    "another ViT": (
        vision(lambda _: {"vision_model.embeddings.patch_embedding.weight": torch.zeros(8, 3, 7, 7)}),
        UnsupportedCheckpointError,
        r"of a kind that Blipstream does not compose: one of patch_embed.proj.weight \(EVA ViT\), conv1.weight \(CLIP "
        r"ViT\) was expected, and it has neither",
    ),
    "both kinds of ViT": (
        vision(lambda _: make_vit("eva") | make_vit("clip")),
        UnsupportedCheckpointError,
        "was expected, and it has both",
    ),
    "a ViT of another width": (
        lambda parts: torch.save(_other_vit(parts), parts.vision),
        CheckpointError,
        r"the Q-Former of .*blip2_trained.pth reads image features of width \d+, and the ViT of .*_vit.pth gives \d+",
    ),
    "positions that make no square": (
        vision(lambda tensors: {name: _cut_positions(name, tensor) for name, tensor in tensors.items()}),
        CheckpointError,
        "the ViT of .*_vit.pth has 16 position embeddings, and 1 more than a square was expected",
    ),
    "no blocks": (
        vision(lambda tensors: {name: tensor for name, tensor in tensors.items() if "blocks." not in name}),
        CheckpointError,
        "was given, and the ViT of .*_vit.pth has 0 blocks",
    ),
    "tensors of blocks missing": (
        vision(
            lambda tensors: {name: tensor for name, tensor in tensors.items() if ".1.mlp" not in name or "bias" in name}
        ),
        CheckpointError,
        r"the ViT of .*_vit.pth lacks 2 tensors \(.*blocks.1.mlp.*.weight, .*blocks.1.mlp.*.weight\)",
    ),
    "heads of another size": (
        lambda parts: torch.save(_narrow_vit(parts), parts.vision),
        UnsupportedCheckpointError,
        r"the ViT of .*_vit.pth is 60 wide, no multiple of \d+, which is the size of a head in LAVIS's",
    ),
    # --- the language model
    "no language model": (
        lambda parts: parts.llm.rename(parts.llm.with_name("other")),
        CheckpointError,
        "llm is not a folder, and a language model in the Hugging Face layout was expected there",
    ),
    "no configuration": (lost("config.json"), CheckpointError, "llm holds no config.json"),
    "no weights": (lost("model.safetensors"), CheckpointError, "llm holds no weights"),
    "no tokenizer": (
        lambda parts: [lost(name)(parts) for name in ("tokenizer.json", "tokenizer_config.json")],
        CheckpointError,
        "llm holds no tokenizer: expected one of tokenizer.json, vocab.json",
    ),
    "another language model": (
        configured(model_type="bert"),
        UnsupportedCheckpointError,
        "llm is a language model of type 'bert', and LAVIS's checkpoints are composed with one of 'opt'",
    ),
    "a language model of no type": (configured(model_type=None), UnsupportedCheckpointError, "of type None"),
    "a projection for another language model": (
        trained(renamed("opt_proj", "t5_proj")),
        CheckpointError,
        "holds t5_proj, which is made for a language model of type t5, and .*llm is one of type opt",
    ),
    "a language model of another width": (
        configured(hidden_size=51),
        CheckpointError,
        "opt_proj of .*blip2_trained.pth projects to width 48, and the language model .*llm is 51 wide",
    ),
    "a language model of another depth": (
        configured(num_hidden_layers=3),
        CheckpointError,
        r"lacks 16 tensors \(language_model.model.decoder.layers.2",
    ),
    "a vocabulary that is too small": (
        configured(vocab_size=300),
        CheckpointError,
        r"is not that of its language model: token .* has id 319, and the language model's vocab_size is 300",
    ),
    "another vocabulary": (
        configured(vocab_size=340),
        CheckpointError,
        r"has shape \(323, 48\), and its configuration asks for \(340, 48\)",
    ),
    "a damaged pickle": (
        lambda parts: [lost("model.safetensors")(parts), (parts.llm / "pytorch_model.bin").write_text("x")],
        CheckpointError,
        "pytorch_model.bin is not a .pth file of tensors as torch.save writes it",
    ),
    "a shard missing": (
        lambda parts: [
            lost("model.safetensors")(parts),
            (parts.llm / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "1.bin", "b": "2.bin"}}'),
        ],
        CheckpointError,
        "llm lacks the shard 1.bin, one of 2 that its index names",
    ),
    "an empty index": (
        lambda parts: [
            lost("model.safetensors")(parts),
            (parts.llm / "pytorch_model.bin.index.json").write_text("{}"),
        ],
        CheckpointError,
        "has no weight_map that says which shard holds each tensor",
    ),
}


def _vit_of(parts: SavedParts) -> VitName:
    return "eva" if parts.vision.name.startswith("eva") else "clip"


def _narrow(parts: SavedParts) -> dict[str, Any]:
    tensors = make_trained(_vit_of(parts), "opt_proj")
    return {"model": tensors | {"query_tokens": torch.zeros(1, 6, 63)}}


def _other_vit(parts: SavedParts) -> dict[str, Tensor]:
    return make_vit(_vit_of(parts), sizes=PartSizes(vision_heads=1))


def _narrow_vit(parts: SavedParts) -> dict[str, Tensor]:
    name = {"eva": "patch_embed.proj.weight", "clip": "conv1.weight"}[_vit_of(parts)]
    return make_vit(_vit_of(parts)) | {name: torch.zeros(60, 3, 7, 7)}


def _cut_positions(name: str, tensor: Tensor) -> Tensor:
    if name == "pos_embed":
        return tensor[:, :16]
    return tensor[:16] if name == "positional_embedding" else tensor


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_one_sentence_and_leaves_nothing(name: str, own_parts: SavedParts, tmp_path: Path) -> None:
    fault, error, message = FAULTS[name]
    fault(own_parts)
    parts = LavisParts(own_parts.trained, own_parts.llm, own_parts.vision, vision_layers=2)
    with pytest.raises(error, match=message) as raised:
        build(parts, tmp_path / "bundle")
    assert type(raised.value) is error
    assert "\n" not in str(raised.value)
    assert not str(raised.value).endswith(".")
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision_layers": 4}, "--vision-layers 4 was given, and the ViT of .*_vit.pth has 3 blocks"),
        ({}, r"has 3 blocks, fewer than the \d+ that LAVIS keeps of its .* ViT: say with --vision-layers how many"),
        ({"vision_layers": 2, "image_size": 6}, "--image-size 6 was given, and one patch of .* has 7 pixels"),
        ({"vision_layers": 2, "vision": None}, "holds no ViT: give the .pth of it with --vision"),
    ],
)
def test_options_that_do_not_fit_the_parts(options: dict[str, Any], message: str, parts: SavedParts) -> None:
    with pytest.raises(CheckpointError, match=message):
        LavisParts(parts.trained, parts.llm, **{"vision": parts.vision, **options}).open()


def _instructed(folder: Path, **changes: Any) -> LavisParts:
    parts = save_parts(folder, "eva", "llama", text_side=True)
    found = {"vision_layers": 2, "qformer_tokenizer": parts.qformer_tokenizer} | changes
    return LavisParts(parts.trained, parts.llm, parts.vision, **found)


def test_instructions_need_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"reads instructions, and its tokenizer, BERT's, lies in no .pth file: g"
    ):
        _instructed(tmp_path, qformer_tokenizer=None).open()
    with pytest.raises(CheckpointError, match=r"nowhere holds no tokenizer: expected one of tokenizer.json"):
        _instructed(tmp_path, qformer_tokenizer=tmp_path / "nowhere").open()


def test_a_tokenizer_for_a_qformer_that_reads_no_instructions(parts: SavedParts, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a tokenizer for the Q-Former was given, and that of .* reads no instr"):
        LavisParts(parts.trained, parts.llm, parts.vision, 2, qformer_tokenizer=tmp_path).open()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{LAYER}.1.intermediate.dense.bias"), f"lacks the tensor {LAYER}.1.intermediate.dense.bias$"),
        (without("Qformer.bert.embeddings.position_embeddings.weight"), r"position_embeddings.weight \(rows, width\)"),
        (
            lambda tensors: {
                name: tensor[:20] if "word_embeddings" in name else tensor for name, tensor in tensors.items()
            },
            r"token '.*' has id \d+, and the Q-Former's vocab_size is 20",
        ),
    ],
)
def test_an_instructed_qformer_must_be_whole(change: Change, message: str, tmp_path: Path) -> None:
    parts = _instructed(tmp_path / "parts")
    rewrite(parts.trained, change)
    with pytest.raises(CheckpointError, match=message):
        build(parts, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_llama_whose_tokenizer_lacks_the_token_that_begins_a_text(tmp_path: Path) -> None:
    parts = _instructed(tmp_path)
    path = parts.llm / "tokenizer.json"
    path.write_text(path.read_text().replace("</s>", "<end>"))
    config = parts.llm / "tokenizer_config.json"
    config.write_text(config.read_text().replace("</s>", "<end>"))
    with pytest.raises(CheckpointError, match="llm has no token </s>, which begins a text of LLaMA in LAVIS"):
        parts.open()


def test_a_trained_part_with_another_kind_of_vit(tmp_path: Path) -> None:
    parts = save_parts(tmp_path, "eva")
    clip = make_vit("clip")
    rewrite(parts.trained, lambda tensors: tensors | {f"visual_encoder.{name}": clip[name] for name in clip})
    with pytest.raises(UnsupportedCheckpointError, match=r"blip2_trained.pth and .*eva_vit.pth is .* and it has both"):
        LavisParts(parts.trained, parts.llm, parts.vision).open()


# --- on the command line ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "neither CHECKPOINT nor --lavis was given, and one of them says what to build"),
        (["x", "--lavis", "q.pth"], "CHECKPOINT and --lavis were given, and one of them says what to build"),
        (["x", "--llm", "opt", "--image-size", "364"], "--llm, --image-size: only a checkpoint that --lavis names has"),
        (["--lavis", "q.pth", "--vision", "v.pth"], "its language model is expected as --llm FOLDER"),
        (["--lavis", "q.pth", "--vision", "v.pth", "--llm", "opt"], "q.pth does not exist, and a .pth file of tensors"),
    ],
)
def test_the_command_line_refuses(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["build", "-o", "out", *arguments])
    assert result.exit_code == 1
    assert result.stderr.startswith("blipstream build: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
