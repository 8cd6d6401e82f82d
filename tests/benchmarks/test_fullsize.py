"""Full-size checkpoints, at an eighth of their widths and one layer each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from blipstream_export.checkpoint import load_model, open_checkpoint
from blipstream_export.weights import read_headers
from transformers import T5Config, T5ForConditionalGeneration

from benchmarks.fullsize import checkpoint as checkpoints
from benchmarks.fullsize.measure import TOKENS, Captions
from benchmarks.likeness import agreement


@pytest.mark.parametrize("kind", checkpoints.KINDS)
def test_a_random_checkpoint_is_whole(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_SHARD_BYTES", 16 << 20)
    checkpoints.write_checkpoint(kind, tmp_path, layers=1, shrink=8)
    headers = read_headers(tmp_path)
    assert {header.dtype for header in headers.values()} == {"F16"}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    model = load_model(open_checkpoint(str(tmp_path)), deferred=False)
    weights = dict(model.named_parameters())
    assert index["metadata"]["total_size"] == 2 * sum(weight.numel() for weight in weights.values())
    matrices = [weight for name, weight in weights.items() if weight.dim() == 2 and "language_model" not in name]
    assert all(0.015 < float(weight.std()) < 0.025 for weight in matrices)
    rows = torch.nn.functional.normalize(matrices[0][:50], dim=1)
    assert float((rows @ rows.T - torch.eye(50)).abs().max()) < 0.6, "rows repeat each other"


def test_t5_is_drawn_as_transformers_draws_it(tmp_path: Path) -> None:
    checkpoints.write_checkpoint("flan-t5-xl", tmp_path, layers=1, shrink=8)
    drawn = dict(load_model(open_checkpoint(str(tmp_path)), deferred=False).language_model.named_parameters())
    torch.manual_seed(0)
    config = T5Config.from_dict(json.loads((tmp_path / "config.json").read_text())["text_config"])
    for name, weight in T5ForConditionalGeneration(config).named_parameters():
        if weight.dim() == 2 and "relative" not in name:  # of which there are few
            assert drawn[name].std().item() == pytest.approx(weight.std().item(), rel=0.1), name


def test_agreement_counts_up_to_the_first_difference() -> None:
    assert agreement([(1, 2, 3, 4), (5, 6, 7, 8)], [(1, 2, 9, 4), (5, 6, 7, 8)]) == 6 / 8


@pytest.mark.parametrize("lengths", [(20, 19), (21, 21), ()])
def test_captions_of_other_lengths_are_not_compared(lengths: tuple[int, ...]) -> None:
    Captions((1.0,), 1, (tuple(range(TOKENS)),))
    with pytest.raises(ValueError, match="captions must have 20 tokens each"):
        Captions((1.0,), 1, tuple(tuple(range(length)) for length in lengths))
