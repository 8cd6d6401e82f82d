"""Bundles of LAVIS's parts: greedy text is LAVIS's own, two of them behind a real server, token for token."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from blipstream_export.inprocess import InProcess
from typer.testing import CliRunner

from blipstream.cli import app
from blipstream.triton.server import TritonServer
from tests.server.faithful import Ask, ask_concurrently, assert_equal
from tests.support.checkpoints import PROMPTS, make_images
from tests.support.lavis_parts import PartSizes, SavedParts, VitName, save_parts, true_sizes
from tests.support.lavis_reference import LavisReference
from tests.support.servers import START_S

pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    # transformers' remark on its own default of 20 new tokens
    pytest.mark.filterwarnings("ignore:Using the model-agnostic default"),
]


@dataclass(frozen=True)
class Variant:
    """What is composed, and how it is asked."""

    vit: VitName
    language: str
    text_side: bool = False
    sizes: PartSizes = field(default_factory=PartSizes)
    text: dict[str, Any] = field(default_factory=dict)
    image_size: int = 28
    new_tokens: int = 24
    served: bool = False


VARIANTS: dict[str, Variant] = {
    "EVA and OPT": Variant("eva", "opt"),
    "CLIP and OPT": Variant("clip", "opt", text_side=True, served=True),
    "EVA and T5 with instructions, positions interpolated": Variant("eva", "t5", text_side=True, image_size=42),
    "EVA and LLaMA with instructions": Variant("eva", "llama", text_side=True, served=True),
    "EVA and OPT-2.7B, of their true widths": Variant(
        "eva",
        "opt",
        sizes=true_sizes("eva"),
        text={"num_hidden_layers": 1, "num_attention_heads": 32, "ffn_dim": 10240},
        image_size=112,
        new_tokens=12,
    ),
    "CLIP and Flan-T5-XL, of their true widths": Variant(
        "clip",
        "t5",
        sizes=true_sizes("clip", text_width=2048),
        text={"num_layers": 1, "num_heads": 32, "d_kv": 64, "d_ff": 5120},
        image_size=112,
        new_tokens=12,
    ),
}
TRUE_WIDTHS = [name for name in VARIANTS if name.endswith("true widths")]


def build(parts: SavedParts, bundle: Path, image_size: int) -> str:
    """Build by the command line, with two of three blocks; return what it printed."""
    arguments = ["--lavis", parts.trained, "--vision", parts.vision, "--llm", parts.llm, "--vision-layers", 2]
    if parts.qformer_tokenizer is not None:
        arguments += ["--qformer-tokenizer", parts.qformer_tokenizer]
    command = ["build", *map(str, arguments), "--image-size", str(image_size), "-o", str(bundle)]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, command)
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in TRUE_WIDTHS])
def test_mixed_requests_equal_lavis(name: str, tmp_path: Path) -> None:
    compare(VARIANTS[name], tmp_path, seed=len(name))


@pytest.mark.large
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", TRUE_WIDTHS)
def test_true_widths(name: str, tmp_path: Path) -> None:
    compare(VARIANTS[name], tmp_path, seed=len(name))


def compare(variant: Variant, tmp_path: Path, seed: int) -> None:
    """32 at once: with prompts of unequal lengths, and without."""
    parts = save_parts(
        tmp_path,
        variant.vit,
        variant.language,
        seed=seed,
        sizes=variant.sizes,
        text_side=variant.text_side,
        text=variant.text,
    )
    printed = build(parts, tmp_path / "bundle", variant.image_size)
    assert "Note: 2 of the 3 blocks of the " in printed
    assert "12 of 12 sample texts equal" in printed
    asks = [Ask(image, PROMPTS[i % len(PROMPTS)]) for i, image in enumerate(make_images(32, seed=1))]
    reference = LavisReference(parts, 2, variant.image_size)
    texts = (compare_served if variant.served else compare_in_process)(tmp_path / "bundle", asks, reference, variant)
    assert len(set(texts)) > 20, "the texts hardly depend on what was asked"


def compare_in_process(bundle: Path, asks: list[Ask], reference: LavisReference, variant: Variant) -> list[str]:
    with InProcess(bundle, threads=1) as local:
        texts = local.generate([ask.image for ask in asks], [ask.prompt for ask in asks], variant.new_tokens)
    expected = [reference.generate(ask, max_new_tokens=variant.new_tokens)[1].strip() for ask in asks]
    assert texts == expected
    return texts


def compare_served(bundle: Path, asks: list[Ask], reference: LavisReference, variant: Variant) -> list[str]:
    with TritonServer(bundle, start_timeout=START_S) as server:
        answers = ask_concurrently(server.grpc_url, asks, max_tokens=variant.new_tokens)
    assert_equal(reference, asks, answers, max_new_tokens=variant.new_tokens)
    if variant.language == "opt":
        ended = [chunks for chunks in answers if chunks[-1].finish_reason == "eos"]
        assert 0 < len(ended) < len(answers)
    return ["".join(chunk.text for chunk in chunks) for chunks in answers]
