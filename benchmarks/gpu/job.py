"""What the process of a measuring part is told, and what it leaves behind."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.rows import Row, read_rows, write_rows

ROWS_FILE, DETAILS_FILE = "rows.csv", "details.json"
DTYPES = ("fp16", "bf16", "fp32")


@dataclass(frozen=True)
class Job:
    """Where a part runs and where its results go.

    Attributes:
        folder: of the part.
        device: ``cuda`` or ``cpu``.
        dtype: of :data:`DTYPES`; what the models compute in.
        checkpoint: folder of the checkpoint.
        work: for files that are large and can be made again.
        seconds: how long each quantity is measured.
    """

    folder: Path
    device: str
    dtype: str
    checkpoint: Path
    work: Path
    seconds: float

    def keep(self, rows: Sequence[Row]) -> None:
        """Add rows to those of the part; they are on disk when it returns."""
        write_rows(self.folder / ROWS_FILE, [*read_rows(self.folder / ROWS_FILE), *rows])

    def note(self, **details: Any) -> None:
        """Add to what the part knows besides rows."""
        known = read_details(self.folder)
        (self.folder / DETAILS_FILE).write_text(json.dumps({**known, **details}) + "\n", encoding="utf-8")

    def arguments(self) -> list[str]:
        """The command line that :func:`parse` reads."""
        options = {name: value for name, value in self.__dict__.items() if name != "folder"}
        return [str(self.folder), *(f"--{name}={value}" for name, value in options.items())]


def read_details(folder: Path) -> dict[str, Any]:
    """What a part noted; nothing where it did not."""
    path = folder / DETAILS_FILE
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def parse(arguments: Sequence[str] | None = None, *extra: str) -> tuple[Job, list[str]]:
    """Read the command line of a part: its job, and the values of its ``extra`` arguments, which come first."""
    parser = argparse.ArgumentParser(description="A part of benchmarks.gpu, which calls it.")
    for name in extra:
        parser.add_argument(name)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True, choices=DTYPES)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    options = vars(parser.parse_args(arguments))
    values = [options.pop(name) for name in extra]
    return Job(**options), values
