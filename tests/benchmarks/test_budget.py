"""The memory budget: against bundles that were built, and against the table in the documentation."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from benchmarks.budget import DEVICES, FIXED, GIB, MODELS, Load, budget, main, table

REPOSITORY = Path(__file__).resolve().parents[2]


def model(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return MODELS[name]()


@pytest.mark.parametrize(("name", "checkpoint"), [("BLIP-2 OPT-2.7B", "opt-2.7b"), ("BLIP-2 OPT-6.7B", "opt-6.7b")])
def test_weights_are_what_a_built_bundle_takes(name: str, checkpoint: str) -> None:
    with (REPOSITORY / "benchmarks" / "results" / "fullsize.csv").open(newline="") as file:
        built = [
            float(row["bundle_gib"])
            for row in csv.DictReader(file)
            if row["checkpoint"] == checkpoint and row["system"] == "blipstream-int8" and float(row["bundle_gib"])
        ]
    assert built
    assert budget(model(name), "int8", Load()).weights / GIB == pytest.approx(built[-1], rel=0.03)


def test_the_cache_grows_with_sequences_and_tokens() -> None:
    opt = model("BLIP-2 OPT-2.7B")
    assert budget(opt, "fp16", Load(4, 256)).cache == 4 * 256 * 2 * (2 * 32 * 2560)
    assert budget(opt, "fp16", Load(8, 128)).cache == budget(opt, "fp16", Load(4, 256)).cache
    assert budget(opt, "fp16", Load(8, 256)).cache == 2 * budget(opt, "fp16", Load(4, 256)).cache


def test_an_encoder_decoder_has_two_caches() -> None:
    assert budget(model("BLIP-2 Flan-T5-XL"), "fp16", Load(1, 100)).cache == 2 * 100 * 2 * (2 * 24 * 32 * 64)


def test_the_total_is_the_sum_of_its_parts() -> None:
    found = budget(model("BLIP-2 OPT-2.7B"), "int8", Load())
    assert found.total == found.weights + found.cache + found.activations + sum(FIXED.values())


def test_larger_batches_need_more_room() -> None:
    opt = model("BLIP-2 OPT-2.7B")
    small, large = (budget(opt, "fp16", Load(max_batch=batch)) for batch in (1, 8))
    assert large.activations > small.activations
    assert (large.weights, large.cache) == (small.weights, small.cache)


def test_the_documentation_has_this_table(capsys: pytest.CaptureFixture[str]) -> None:
    text = (REPOSITORY / "docs" / "jetson.md").read_text()
    assert table(Load()) in text, "run `python -m benchmarks.budget` and put what it prints into docs/jetson.md"
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(line in text for line in said.splitlines() if line)


def test_what_does_not_fit_is_said() -> None:
    lines = table(Load(max_sequences=32, max_tokens=2048)).splitlines()
    opt = next(line for line in lines if line.startswith("| BLIP-2 OPT-2.7B | fp16"))
    assert opt.split(" | ")[-len(DEVICES) :] == ["no", "no", "yes |"]
