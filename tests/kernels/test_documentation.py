"""docs/kernels.md shows the rows that were recorded, and the multiply-adds that the kernels do."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from blipstream_kernels.aot import table

from benchmarks import kernels

ROOT = Path(__file__).parents[2]


def test_the_documentation_has_the_table_of_the_rows() -> None:
    with (ROOT / "benchmarks/results/kernels-aot.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["architecture"] for row in rows} == {"sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100"}
    assert all(int(row["spill_bytes"]) == 0 for row in rows)
    assert table(rows) in (ROOT / "docs/kernels.md").read_text()


def test_the_documentation_has_the_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["--costs"]) == 0
    assert capsys.readouterr().out in (ROOT / "docs/kernels.md").read_text(), (
        "run `python -m benchmarks.kernels --costs` and put what it prints into docs/kernels.md"
    )
