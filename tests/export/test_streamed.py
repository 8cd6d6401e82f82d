"""A checkpoint that is too large for memory: run weight by weight, and built as any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blipstream_export import build as build_module
from blipstream_export import needs
from blipstream_export.build import BuildOptions, BuildResult, build
from blipstream_export.checkpoint import load_model, open_checkpoint
from blipstream_export.reference import BRIEF, compute_reference
from blipstream_export.shards import deferred_tensors

from blipstream.manifest import PARITY_FILE
from tests.support.checkpoints import save_blip2

NOISE = dict.fromkeys(("cosine", "relative_error", "max_difference"))
"""Figures that are rounding alone."""


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "total_memory", lambda: 1 << 16)
    real = build_module.load_model

    def load(*args: Any, deferred: bool = False) -> Any:
        assert deferred, "the whole checkpoint was loaded"
        return real(*args, deferred=True)

    monkeypatch.setattr(build_module, "load_model", load)


@pytest.mark.usefixtures("little_memory")
def test_the_bundle_is_the_same(random_bundle: BuildResult, random_checkpoint: Path, tmp_path: Path) -> None:
    result = build(str(random_checkpoint), tmp_path / "bundle", BuildOptions(max_sequences=5))
    assert result.manifest == random_bundle.manifest
    reports = [json.loads((r.bundle / PARITY_FILE).read_text()) for r in (result, random_bundle)]
    assert [report.pop("streamed") for report in reports] == [True, False]
    stages = [report.pop("stages") for report in reports]
    assert reports[0] == reports[1]
    for first, second in zip(*stages, strict=True):  # memory is aligned otherwise, which moves the last bits
        assert {**first, **NOISE} == {**second, **NOISE}


@pytest.mark.usefixtures("little_memory")
def test_large_checkpoints_are_run_on_few_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "_BRIEF_FROM", 1000)
    folder = save_blip2(tmp_path / "checkpoint", "t5", max_shard_size="100KB")
    result = build(str(folder), tmp_path / "bundle")
    assert len(result.parity.texts) == BRIEF.texts
    assert max(len(text.expected) for text in result.parity.texts) <= BRIEF.new_tokens
    assert result.parity.streamed


def test_a_streamed_reference_is_the_reference(random_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(random_checkpoint))
    sizes = checkpoint.decoder_section(max_sequences=2, max_tokens=64)
    whole, streamed = (
        compute_reference(load_model(checkpoint, deferred=deferred), checkpoint, sizes, BRIEF)
        for deferred in (False, True)
    )
    assert (whole.streamed, streamed.streamed) == (False, True)
    np.testing.assert_allclose(whole.image_embeds, streamed.image_embeds, rtol=0, atol=1e-4)
    for first, second in zip(whole.texts, streamed.texts, strict=True):
        assert first.token_ids == second.token_ids
        np.testing.assert_allclose(first.logits, second.logits, rtol=0, atol=1e-3)


def test_no_weight_is_kept(random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is read, nothing is alive when the next tensor is read, but for what the operation at hand needs."""
    import weakref

    from blipstream_export import shards

    real, alive, most = shards.read_tensor, weakref.WeakSet(), 0

    def read(header: Any) -> Any:
        nonlocal most
        tensor = real(header)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(shards, "read_tensor", read)
    checkpoint = open_checkpoint(str(random_checkpoint))
    assert len(deferred_tensors(random_checkpoint)) > 50
    model = load_model(checkpoint, deferred=True)
    assert most == 0
    compute_reference(model, checkpoint, checkpoint.decoder_section(max_sequences=2, max_tokens=64), BRIEF)
    assert 0 < most <= 4
