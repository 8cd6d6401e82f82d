"""A composed checkpoint computes what LAVIS computes, and says what it took from where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from blipstream_export.checkpoint import Checkpoint, load_model
from blipstream_export.generation import generation_section
from blipstream_export.graphs import export_graph, vision_inputs
from blipstream_export.lavis.composition import LavisParts
from blipstream_export.lavis.parts import grouped
from blipstream_export.lavis.vision import interpolate_positions
from blipstream_export.models.qformer import InstructionQFormer, QFormer
from blipstream_export.models.vision import VisionEncoder
from blipstream_export.tokenizer import check_qformer_tokenizer, check_tokenizer, instruction_ids
from torch import Tensor

from blipstream.contract import GRAPH_FILE, IMAGE_EMBEDS, PIXEL_VALUES
from blipstream.engines import create_engine
from tests.server.faithful import Ask
from tests.support.checkpoints import PROMPTS, make_images
from tests.support.lavis_parts import (
    HEAD_DIMS,
    PartSizes,
    SavedParts,
    VitName,
    make_vit,
    rewrite,
    save_language_model,
    save_parts,
)
from tests.support.lavis_reference import LavisReference

# transformers' remark on its own default of 20 new tokens
pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default")

BLOCKS = 2
"""Of the three in the files."""


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def opened(parts: SavedParts, **options: Any) -> Checkpoint:
    options = {"vision_layers": BLOCKS, "qformer_tokenizer": parts.qformer_tokenizer} | options
    return LavisParts(parts.trained, parts.llm, parts.vision, **options).open()


def reference(parts: SavedParts, blocks: int = BLOCKS, image_size: int = 28) -> LavisReference:
    return LavisReference(parts, blocks, image_size)


# --- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [28, 42, 14, 30], ids=lambda size: f"{size} pixels")
def test_image_side_equals_lavis(image_size: int, parts: SavedParts, vit: VitName) -> None:
    """In transformers' classes and in the wrappers; position embeddings are for 28 pixels, and interpolated else."""
    expected = reference(parts, image_size=image_size)
    model = load_model(opened(parts, image_size=image_size))
    pixel_values = torch.randn(3, 3, image_size, image_size)
    embeds, soft_tokens = expected.image_embeds(pixel_values), expected.soft_tokens(pixel_values)
    features = model.get_image_features(pixel_values, return_dict=True)
    assert_close(features.last_hidden_state, embeds)
    assert_close(features.pooler_output, soft_tokens)
    assert_close(VisionEncoder(model.vision_model)(pixel_values), embeds)
    assert_close(QFormer(model)(embeds), soft_tokens)


def test_vision_graph_equals_lavis(parts: SavedParts, tmp_path: Path) -> None:
    model = load_model(opened(parts))
    export_graph(VisionEncoder(model.vision_model), vision_inputs(28), tmp_path / GRAPH_FILE, engine="onnxruntime")
    with create_engine("onnxruntime", tmp_path / GRAPH_FILE, threads=1) as engine:
        for pixel_values in (torch.randn(1, 3, 28, 28), torch.randn(3, 3, 28, 28)):
            found = engine.run({PIXEL_VALUES.name: pixel_values.numpy()})[IMAGE_EMBEDS.name].copy()
            assert_close(torch.from_numpy(found), reference(parts).image_embeds(pixel_values))


@pytest.mark.parametrize(
    "sizes",
    [
        PartSizes(vision_heads=1, qformer_heads=2, qformer_layers=1, num_query_tokens=1, vision_blocks=2),
        PartSizes(vision_heads=3, cross_attention_frequency=1, qformer_layers=2, image_size=33, patch_size=8),
        PartSizes(cross_attention_frequency=3, qformer_layers=5, text_width=30),
    ],
    ids=str,
)
def test_sizes_are_read_from_the_tensors(sizes: PartSizes, vit: VitName, tmp_path: Path) -> None:
    parts = save_parts(tmp_path, vit, sizes=sizes)
    checkpoint = opened(parts)
    config, grid = checkpoint.config, sizes.image_size // sizes.patch_size
    assert (config.vision_config.hidden_size, config.vision_config.num_attention_heads) == (
        sizes.vision_heads * HEAD_DIMS[vit],
        sizes.vision_heads,
    )
    assert (config.vision_config.image_size, checkpoint.image.size) == (grid * sizes.patch_size,) * 2
    assert (config.qformer_config.num_attention_heads, config.num_query_tokens) == (
        sizes.qformer_heads,
        sizes.num_query_tokens,
    )
    pixel_values = torch.randn(2, 3, checkpoint.image.size, checkpoint.image.size)
    features = load_model(checkpoint).get_image_features(pixel_values, return_dict=True)
    expected = reference(parts, image_size=checkpoint.image.size)
    assert_close(features.pooler_output, expected.soft_tokens(pixel_values))


def test_half_precision_parts_are_computed_in_fp32(own_parts: SavedParts, vit: VitName) -> None:
    rewrite(own_parts.vision, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})
    model = load_model(opened(own_parts))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    rewrite(own_parts.vision, lambda tensors: {name: tensor.float() for name, tensor in tensors.items()})
    pixel_values = torch.randn(1, 3, 28, 28)
    found = model.get_image_features(pixel_values, return_dict=True).last_hidden_state
    assert_close(found, reference(own_parts).image_embeds(pixel_values))


def test_corners_are_aligned_for_clip_alone() -> None:
    positions = torch.randn(1, 17, 5)
    aligned = interpolate_positions(positions, 7, align_corners=True)
    plain = interpolate_positions(positions, 7, align_corners=False)
    for interpolated in (aligned, plain):
        assert interpolated.shape == (1, 50, 5)
        assert torch.equal(interpolated[:, 0], positions[:, 0])
    corners, small = [1, 7, 43, 49], [1, 4, 13, 16]
    assert_close(aligned[:, corners], positions[:, small])
    assert not torch.allclose(plain[:, corners], positions[:, small], atol=0.01)


# --- how many blocks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vit", "in_file", "kept"), [("eva", 40, 39), ("clip", 24, 23), ("clip", 23, 23)], ids=str, scope="function"
)
def test_lavis_number_of_blocks(vit: VitName, in_file: int, kept: int, tmp_path: Path) -> None:
    """At the depth of LAVIS's own files, without an option."""
    parts = save_parts(tmp_path, vit, sizes=PartSizes(vision_heads=1, vision_blocks=in_file))
    checkpoint = opened(parts, vision_layers=None)
    assert checkpoint.config.vision_config.num_hidden_layers == kept
    name = {"eva": "EVA ViT", "clip": "CLIP ViT"}[vit]
    assert checkpoint.notes[0] == (
        f"{kept} of the {in_file} blocks of the {name} are kept (LAVIS's number for its {name})"
    )
    pixel_values = torch.randn(1, 3, 28, 28)
    found = load_model(checkpoint).get_image_features(pixel_values, return_dict=True).last_hidden_state
    assert_close(found, reference(parts, kept).image_embeds(pixel_values), tolerance=1e-4)


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_option_says_how_many_blocks_are_kept(blocks: int, parts: SavedParts, vit: VitName) -> None:
    checkpoint = opened(parts, vision_layers=blocks)
    assert checkpoint.notes[0].startswith(f"{blocks} of the 3 blocks of the ")
    assert checkpoint.notes[0].endswith("(as --vision-layers says)")
    pixel_values = torch.randn(1, 3, 28, 28)
    found = load_model(checkpoint).get_image_features(pixel_values, return_dict=True).last_hidden_state
    assert_close(found, reference(parts, blocks).image_embeds(pixel_values))


# --- a trained part that holds the ViT -------------------------------------------------------------------------------


def test_a_vit_within_the_trained_part(own_parts: SavedParts, vit: VitName) -> None:
    """As in the checkpoints that LAVIS trained with their ViT: it needs no other file, and no number of blocks."""
    held = make_vit(vit, sizes=PartSizes(vision_blocks=2), seed=9)
    rewrite(own_parts.trained, lambda tensors: tensors | {f"visual_encoder.{name}": held[name] for name in held})
    checkpoint = LavisParts(own_parts.trained, own_parts.llm).open()
    assert checkpoint.notes[0].endswith("are kept (as many as the trained part holds)")
    torch.save(held, own_parts.vision)
    pixel_values = torch.randn(1, 3, 28, 28)
    features = load_model(checkpoint).get_image_features(pixel_values, return_dict=True)
    assert_close(features.pooler_output, reference(own_parts).soft_tokens(pixel_values))


def test_what_the_trained_part_holds_of_the_vit_counts(own_parts: SavedParts, vit: VitName) -> None:
    """Two blocks of it were trained; the third is left out, and the embeddings come from the ViT's own file."""
    other = make_vit(vit, seed=9)
    trained = [name for name in other if ".0." in name or ".1." in name]
    rewrite(own_parts.trained, lambda tensors: tensors | {f"visual_encoder.{name}": other[name] for name in trained})
    checkpoint = opened(own_parts, vision_layers=None)
    assert checkpoint.notes[0].startswith("2 of the 3 blocks of the ")
    rewrite(own_parts.vision, lambda tensors: tensors | {name: other[name] for name in trained})
    pixel_values = torch.randn(1, 3, 28, 28)
    features = load_model(checkpoint).get_image_features(pixel_values, return_dict=True)
    assert_close(features.last_hidden_state, reference(own_parts).image_embeds(pixel_values))


@pytest.mark.parametrize("prefix", ["visual.", "visual_encoder."])
def test_a_prefix_within_the_file_of_the_vit(prefix: str, own_parts: SavedParts, vit: VitName) -> None:
    plain = load_model(opened(own_parts)).vision_model.state_dict()
    rewrite(own_parts.vision, lambda tensors: {prefix + name: tensors[name] for name in tensors} | {"x": torch.ones(1)})
    prefixed = load_model(opened(own_parts)).vision_model.state_dict()
    assert plain.keys() == prefixed.keys()
    assert all(torch.equal(plain[name], prefixed[name]) for name in plain)


# --- accounts --------------------------------------------------------------------------------------------------------


def test_every_tensor_is_accounted_for(vit: VitName, tmp_path: Path) -> None:
    parts = save_parts(tmp_path, vit, text_side=True)
    kept, trained, vision, end, defaults = opened(parts).notes
    assert kept.startswith("2 of the 3 blocks of the ")
    assert trained == (
        "of blip2_trained.pth, 75 tensors are used and 21 left over (Qformer.bert.encoder.layer.*.output: 12, "
        "Qformer.bert.encoder.layer.*.intermediate: 6, Qformer.bert.embeddings.position_embeddings: 1, "
        "Qformer.bert.embeddings.word_embeddings: 1, Qformer.cls.predictions: 1)"
    )
    assert (
        vision
        == {
            "eva": "of eva_vit.pth, 30 tensors are used and 17 left over (blocks.2.attn: 5, blocks.2.mlp: 4, "
            "blocks.2.norm1: 2, blocks.2.norm2: 2, head: 2, norm: 2)",
            "clip": "of clip_vit.pth, 29 tensors are used and 15 left over (transformer.resblocks.2.attn: 4, "
            "transformer.resblocks.2.mlp: 4, ln_post: 2, transformer.resblocks.2.ln_1: 2, "
            "transformer.resblocks.2.ln_2: 2, proj: 1)",
        }[vit]
    )
    assert end == "answers end at a line break (token 202), which LAVIS trains OPT for, and not at </s>"
    assert "decoded greedily" in defaults


def test_nothing_left_over_is_said_as_well(own_parts: SavedParts) -> None:
    assert opened(own_parts).notes[1] == "of blip2_trained.pth, 75 tensors are used and none left over"


def test_names_are_grouped_by_layer_and_the_largest_groups_shown() -> None:
    names = [f"layers.{layer}.{part}.weight" for layer in range(5) for part in ("attn", "mlp")]
    names += [f"a{index}.weight" for index in range(6)] + ["layers.4.mlp.bias", "scale"]
    assert grouped(names) == ("layers.*.mlp: 6, layers.*.attn: 5, a0: 1, a1: 1, a2: 1, a3: 1, others: 3")
    assert grouped([]) == ""


# --- the language model ----------------------------------------------------------------------------------------------


KINDS: dict[str, tuple[VitName, str, bool]] = {
    "blip2-opt": ("eva", "opt", True),  # whose Q-Former keeps its layers for texts, unused
    "blip2-t5": ("clip", "t5", False),
    "blip2-llama": ("eva", "llama", False),
    "instructblip-t5": ("eva", "t5", True),
    "instructblip-llama": ("clip", "llama", True),
}
"""ViT, language model, and whether the Q-Former has layers for texts."""


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def kind_parts(kind: str, tmp_path_factory: pytest.TempPathFactory) -> SavedParts:
    vit, language, text_side = KINDS[kind]
    return save_parts(tmp_path_factory.mktemp(kind), vit, language, text_side=text_side)


def test_greedy_text_equals_lavis(kind: str, kind_parts: SavedParts) -> None:
    """The composed model in transformers, which is what a bundle is compared with, and LAVIS."""
    checkpoint, expected = opened(kind_parts), reference(kind_parts)
    assert checkpoint.family.kind == kind
    check_tokenizer(checkpoint)
    if checkpoint.instructed:
        check_qformer_tokenizer(checkpoint)
    model, texts = load_model(checkpoint), set()
    for image in make_images(2):
        for prompt in PROMPTS:
            text = {"text": prompt} if prompt or checkpoint.instructed else {}
            inputs = checkpoint.processor(images=image, return_tensors="pt", **text)
            output = model.generate(
                **inputs, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            tokens = output.sequences[0, -len(output.logits) :].tolist()
            assert tokens == expected.generate(Ask(image, prompt), max_new_tokens=12)[0], prompt
            texts.add(tuple(tokens))
    assert len(texts) > 5, "the texts hardly depend on image and prompt"


def test_qformer_of_each_kind_equals_lavis(kind_parts: SavedParts) -> None:
    checkpoint, expected = opened(kind_parts), reference(kind_parts)
    model, pixel_values = load_model(checkpoint), torch.randn(2, 3, 28, 28)
    embeds = expected.image_embeds(pixel_values)
    for prompt in PROMPTS:
        soft_tokens = expected.soft_tokens(pixel_values, prompt)
        if checkpoint.instructed:
            ids = torch.tensor([instruction_ids(checkpoint, prompt)]).expand(2, -1)
            assert_close(InstructionQFormer(model)(embeds, ids, torch.ones_like(ids)), soft_tokens)
        else:
            assert_close(QFormer(model)(embeds), soft_tokens)


DEFAULTS = {"pad_token_id": None, "image_token_id": None, "max_new_tokens": 20, "repetition_penalty": 1.0}

GENERATION: dict[str, dict[str, Any]] = {
    # the end token is the line break; <image> stands behind the tokenizer's own tokens, in a row to spare
    "opt": {"empty_prompt_ids": (2,), "eos_token_ids": (202,), "pad_token_id": 1, "image_token_id": 320},
    "t5": {"empty_prompt_ids": (1,), "eos_token_ids": (1,), "pad_token_id": 0},
    "llama": {"empty_prompt_ids": (2,), "eos_token_ids": (2,)},
}


def test_generation_is_that_of_the_conversion(kind: str, kind_parts: SavedParts) -> None:
    checkpoint = opened(kind_parts)
    section = generation_section(load_model(checkpoint), checkpoint)
    language = KINDS[kind][1]
    placeholder = len(checkpoint.processor.tokenizer) - 1
    template = "{}" if kind.startswith("instruct") else "Question: {} Answer:"
    expected = {"image_token_id": placeholder, "question_template": template}
    assert section.model_dump() == DEFAULTS | expected | GENERATION[language]
    assert checkpoint.name == "blip2_trained"
    told = {"opt": "end at a line break (token 202)", "t5": "exact GELU", "llama": "prompts begin with </s>"}[language]
    assert told in checkpoint.notes[-2]


def test_a_language_model_without_a_row_for_the_placeholder(own_parts: SavedParts) -> None:
    save_language_model(own_parts.llm, text={"vocab_size": 320})
    checkpoint = opened(own_parts)
    check_tokenizer(checkpoint)
    assert checkpoint.config.image_token_index is None


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("headless", [False, True])
def test_language_model_of_pickles(headless: bool, sharded: bool, own_parts: SavedParts) -> None:
    """As OPT was published: pytorch_model.bin, and from before the head, so that names lack their first component."""
    expected = load_model(opened(own_parts)).language_model.state_dict()
    _pickle_weights(own_parts.llm, headless=headless, sharded=sharded)
    found = load_model(opened(own_parts)).language_model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_language_model_of_shards(own_parts: SavedParts) -> None:
    from transformers import OPTForCausalLM

    expected = load_model(opened(own_parts)).language_model.state_dict()
    model = OPTForCausalLM.from_pretrained(own_parts.llm)
    (own_parts.llm / "model.safetensors").unlink()
    model.save_pretrained(own_parts.llm, max_shard_size="100KB")
    assert len(list(own_parts.llm.glob("model-*.safetensors"))) > 1
    found = load_model(opened(own_parts)).language_model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def _pickle_weights(folder: Path, *, headless: bool, sharded: bool) -> None:
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if headless:
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    if not sharded:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    files = {name: f"pytorch_model-{len(name) % 2}.bin" for name in tensors}
    for file in set(files.values()):
        torch.save({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
