"""The files of a run: checked before it, written after it, each whatever becomes of the others."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from blipstream.bench.report import Result
from blipstream.errors import BlipstreamError, InvalidRequestError

STDOUT = Path("-")
PLOTS = (".png", ".svg", ".pdf", ".jpg", ".webp")
_NEEDED_BYTES = 1 << 20
"""Free on a disk, so that a report fits."""

Write = Callable[[Path, Sequence[Result]], None]


@dataclass(frozen=True)
class Outputs:
    """Where the figures go, beside the terminal; ``-`` is standard output.

    Attributes:
        json_file: of all figures.
        csv_file: to which rows are appended.
        plot_file: of latency against throughput.
    """

    json_file: Path | None = None
    csv_file: Path | None = None
    plot_file: Path | None = None

    @property
    def to_stdout(self) -> bool:
        """Whether one of them is standard output."""
        return STDOUT in (self.json_file, self.csv_file)

    def check(self, columns: Sequence[str]) -> None:
        """See that all can be written, with rows of these columns.

        Raises:
            InvalidRequestError: one cannot.
            ModuleNotFoundError: a plot is wanted and matplotlib is missing.
        """
        files = [file for file in (self.json_file, self.csv_file, self.plot_file) if file]
        if len(set(files)) < len(files):
            raise InvalidRequestError(f"each output must be a file of its own, but two are {files[-1]}")
        if self.plot_file:
            _check_plot(self.plot_file)
        for file in files:
            if file != STDOUT:
                check_file(file)
        if self.csv_file and self.csv_file != STDOUT:
            _needs_header(self.csv_file, columns)

    def write(self, results: Sequence[Result]) -> None:
        """Write all of them.

        Raises:
            InvalidRequestError: some could not be written; all are named.
        """
        files: tuple[tuple[Path | None, Write], ...] = (
            (self.json_file, write_json),
            (self.csv_file, append_csv),
            (self.plot_file, draw),
        )
        failed = []
        for file, write in files:
            try:
                if file:
                    write(file, results)
            except BlipstreamError as error:
                failed.append(str(error))
            except OSError as error:
                failed.append(_cannot(file, error))
        if failed:
            raise InvalidRequestError("; ".join(failed))


def write_json(path: Path, results: Sequence[Result]) -> None:
    """All figures, what failed and what the server counted; a figure that there is not is null."""
    runs = [
        {**_known(result.row()), "errors": dict(result.figures.errors), "server": result.server} for result in results
    ]
    with _opened(path, "w") as file:
        file.write(json.dumps({"runs": runs}, indent=2) + "\n")


def append_csv(path: Path, results: Sequence[Result]) -> None:
    """Append a row for each run to a file, which is made if it is missing.

    Raises:
        InvalidRequestError: the file has other columns.
    """
    columns = list(results[0].row())
    is_new = path == STDOUT or _needs_header(path, columns)
    with _opened(path, "a") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(result.row() for result in results)


def draw(path: Path, results: Sequence[Result]) -> None:
    """Draw latency against throughput, one point for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    for axes, name, title in zip(
        figure.subplots(1, 2), ("ttft", "e2el"), ("time to first token", "request latency"), strict=True
    ):
        x = [result.figures.request_throughput for result in results]
        for rank, style in (("p50", "o-"), ("p99", "o:")):
            y = [result.figures.latencies[f"{rank}_{name}_ms"] for result in results]
            axes.plot(x, y, style, label=rank, markersize=4)
        for result, at in zip(results, x, strict=True):
            axes.annotate(result.load, (at, result.figures.latencies[f"p50_{name}_ms"]), fontsize=7)
        axes.set(title=f"{title}, ms", xlabel="requests per second", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)


def _check_plot(path: Path) -> None:
    if path.suffix.lower() not in PLOTS:
        raise InvalidRequestError(f"a plot's name must end in {', '.join(PLOTS)}, but it is {str(path)!r}")
    import_module("matplotlib")


def check_file(path: Path) -> None:
    """See that a file can be written, and leave it as it was.

    Raises:
        InvalidRequestError: it cannot.
    """
    is_new = not os.path.lexists(path)
    try:
        if not is_new and path.exists() and not path.is_file() and not path.is_dir():
            return  # a pipe or a device
        path.open("ab").close()
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise InvalidRequestError(_cannot(path, error)) from None
    finally:
        if is_new:
            path.unlink(missing_ok=True)
    if free < _NEEDED_BYTES:
        raise InvalidRequestError(f"{path} cannot be written: its disk must have 1 MiB free, but it has {free} bytes")


def _needs_header(path: Path, columns: Sequence[str]) -> bool:
    """Whether the file is missing or empty; else it must have these columns, and end with a line."""
    if not path.is_file() or not path.stat().st_size:
        return True
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            found = next(csv.reader(file), [])
    except (csv.Error, UnicodeDecodeError):
        found = []
    if found != columns:
        differing = ", ".join(sorted(set(found) ^ set(columns))) or "their order"
        raise InvalidRequestError(f"{path} has other columns than the rows of this run, differing in {differing}")
    if not path.read_bytes().endswith(b"\n"):
        raise InvalidRequestError(f"{path} must end with a whole line, but its last line has no end")
    return False


@contextmanager
def _opened(path: Path, mode: str) -> Iterator[IO[str]]:
    if path == STDOUT:
        yield sys.stdout
        return
    with path.open(mode, newline="", encoding="utf-8") as file:
        yield file


def _cannot(path: Path | None, error: OSError) -> str:
    return f"{path} cannot be written: {error.strerror or error}"


def _known(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
