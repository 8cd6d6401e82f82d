"""The benchmark of a bundle's stages, on a bundle of a random checkpoint."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from blipstream_export.build import BuildResult

from benchmarks.fullsize import stages
from benchmarks.fullsize.__main__ import main
from benchmarks.sizes import model_sizes
from tests.support.checkpoints import make_blip2_opt


def test_every_stage_is_timed_in_every_round(
    random_bundle: BuildResult, random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "_READ_BYTES", 1 << 20)
    arguments = ["stages", str(random_checkpoint), str(random_bundle.bundle), "--rounds", "2"]
    assert main([*arguments, "--results", str(tmp_path)]) == 0
    with (tmp_path / "stages.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {(row["stage"], int(row["rows"])) for row in rows}
    assert {("memory", 0), ("vision_encoder", 1), ("qformer", 1), ("prefill", 1), ("step", 1)} <= found
    assert len(found) == len(rows)
    for row in rows:
        assert 0 < float(row["min_ms"]) <= float(row["p50_ms"]) <= float(row["max_ms"])
        assert (float(row["bandwidth_share"]) > 0) == (row["stage"] == "step")
        assert row["precision"] == "fp32/fp32/fp32"


def test_bytes_of_a_step_are_those_of_its_weights(random_bundle: BuildResult) -> None:
    """What the graph holds against arithmetic on the model, four bytes a value; constants come on top."""
    values = model_sizes(make_blip2_opt()).step_weights
    assert 4 * values <= stages.step_bytes(random_bundle.bundle) < 4.2 * values
