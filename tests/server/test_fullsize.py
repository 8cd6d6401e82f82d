"""Captions of a bundle beside those of transformers, and its stages, on a random checkpoint."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks.fullsize.__main__ import main

pytestmark = [pytest.mark.server, pytest.mark.slow]


def test_captions_beside_transformers(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    link = tmp_path / "bundle"
    link.symlink_to(bundle)  # the peer's log lies beside it
    options = ("--built", "--captions", "2", "--peers", "fp32", "--results", str(tmp_path))
    assert main(["run", str(checkpoint), str(link), "--precision", "fp32", *options]) == 0
    with (tmp_path / "fullsize.csv").open() as file:
        ours, theirs = csv.DictReader(file)
    assert (ours["system"], theirs["system"]) == ("blipstream-fp32", "transformers-fp32")
    assert (float(ours["tokens_equal"]), float(theirs["tokens_equal"])) == (1, 1)
    ratio = float(theirs["caption_p50_s"]) / float(ours["caption_p50_s"])
    assert float(theirs["caption_ratio"]) == pytest.approx(ratio, rel=0.1)
    assert all(0.1 < float(row["memory_gib"]) < 3 for row in (ours, theirs))
    assert (tmp_path / "bundle-fp32.log").exists()


def test_stages_are_timed_and_drawn(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert main(["stages", str(checkpoint), str(bundle), "--rounds", "2", "--results", str(tmp_path)]) == 0
    with (tmp_path / "stages.csv").open() as file:
        rows = list(csv.DictReader(file))
    once = rows[: len(rows) // 2]
    assert {row["stage"] for row in once} == {"memory", "vision_encoder", "qformer", "prefill", "step"}
    steps = [row for row in once if row["stage"] == "step"]
    assert [int(row["rows"]) for row in steps] == [1, 2]
    assert all(0 < float(row["min_ms"]) <= float(row["p50_ms"]) <= float(row["max_ms"]) for row in once)
    assert all(float(row["bandwidth_share"]) > 0 for row in steps)
    (plot,) = tmp_path.glob("stages-*.png")
    assert plot.read_bytes().startswith(b"\x89PNG")
