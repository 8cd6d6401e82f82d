"""What is shown and written of the runs: a table, JSON, rows of CSV, a plot."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from blipstream.bench.figures import LATENCIES, Figures
from blipstream.errors import InvalidRequestError


@dataclass(frozen=True)
class Result:
    """One load and what it came to.

    Attributes:
        load: as in the table.
        setting: what was run: columns of the row that come first.
        figures: what it came to.
        server: what the server counted meanwhile, by model or by metric.
    """

    load: str
    setting: Mapping[str, Any]
    figures: Figures
    server: Mapping[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Columns of a row."""
        return {**self.setting, **self.figures.flat()}


def make_table(results: Sequence[Result]) -> Table:
    """The most important figures of each run."""
    table = Table(title="medians and 99th percentiles in milliseconds")
    for column in ("load", "answered", "failed", "requests/s", "tokens/s", "goodput/s", *LATENCIES):
        table.add_column(column, justify="right")
    for result in results:
        own = result.figures
        pairs = [(own.latencies[f"p50_{name}_ms"], own.latencies[f"p99_{name}_ms"]) for name in LATENCIES]
        cells = [str(own.completed), str(own.failed), f"{own.request_throughput:.2f}", f"{own.output_throughput:.1f}"]
        table.add_row(
            result.load, *cells, _shown(own.request_goodput), *(f"{_shown(a)} / {_shown(b)}" for a, b in pairs)
        )
    return table


def write_json(path: Path, results: Sequence[Result]) -> None:
    """All figures, what failed and what the server counted; a figure that there is not is null."""
    runs = [
        {**_known(result.row()), "errors": dict(result.figures.errors), "server": result.server} for result in results
    ]
    path.write_text(json.dumps({"runs": runs}, indent=2) + "\n", encoding="utf-8")


def append_csv(path: Path, results: Sequence[Result]) -> None:
    """Append a row for each run to a file, which is made if it is missing.

    Raises:
        InvalidRequestError: the file has other columns.
    """
    columns = list(results[0].row())
    is_new = not path.exists()
    if not is_new:
        with path.open(newline="", encoding="utf-8") as file:
            found = next(csv.reader(file), [])
        if found != columns:
            differing = ", ".join(sorted(set(found) ^ set(columns))) or "their order"
            raise InvalidRequestError(f"{path} has other columns than the rows of this run, differing in {differing}")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(result.row() for result in results)


def draw(path: Path, results: Sequence[Result]) -> None:
    """Draw latency against throughput, one point for each run.

    Raises:
        InvalidRequestError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise InvalidRequestError("a plot needs matplotlib: `pip install 'blipstream[bench]'`") from None
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


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"


def _known(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
