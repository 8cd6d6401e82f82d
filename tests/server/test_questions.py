"""The benchmark of further questions, on a bundle of a random checkpoint."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks.fullsize.__main__ import main

pytestmark = pytest.mark.server


def test_further_questions_and_what_the_server_adds(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    assert main(["questions", str(checkpoint), str(bundle), "--images", "2", "--results", str(tmp_path)]) == 0
    with (tmp_path / "questions.csv").open() as file:
        (row,) = csv.DictReader(file)
    first, second = float(row["first_p50_s"]), float(row["second_p50_s"])
    assert float(row["second_ratio"]) == pytest.approx(first / second, rel=0.02)
    assert float(row["overhead"]) > 0, "the engines cannot have run for longer than the client has waited"
    assert row["tritonserver"]
    assert row["precision"] == "fp32/fp32/fp32"
