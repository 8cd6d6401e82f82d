"""The rows of the report: one for each measured quantity of each system and batch."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

CAPTION, PREFILL, STEP, VISION, QFORMER = "caption", "prefill", "decode step", "vision encoder", "qformer"
BUILD, FILE, COPY, MATMUL = "build", "file", "copy", "matmul"


@dataclass(frozen=True)
class Row:
    """One quantity.

    Attributes:
        system: what was measured.
        what: the quantity: one of the names above, with a file or a type behind it where there are several.
        batch: images or sequences at once; 0 where there are none.
        unit: of the three values.
        p20: 20th percentile over the repetitions.
        p50: median.
        p80: 80th percentile.
        repeats: how often it was measured.
    """

    system: str
    what: str
    batch: int
    unit: str
    p20: float
    p50: float
    p80: float
    repeats: int


def single(system: str, what: str, unit: str, value: float) -> Row:
    """The row of a quantity that was measured once."""
    return Row(system, what, 0, unit, value, value, value, 1)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as CSV; an existing file is replaced."""
    columns = [field.name for field in dataclasses.fields(Row)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)


def read_rows(path: Path) -> list[Row]:
    """Read rows; none from a file that does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [_row(line) for line in csv.DictReader(file)]


def _row(line: dict[str, str]) -> Row:
    values = (float(line[name]) for name in ("p20", "p50", "p80"))
    return Row(line["system"], line["what"], int(line["batch"]), line["unit"], *values, int(line["repeats"]))


def find(rows: Sequence[Row], system: str, what: str, batch: int = 0) -> Row | None:
    """The last row of a quantity."""
    found = [row for row in rows if (row.system, row.what, row.batch) == (system, what, batch)]
    return found[-1] if found else None
