"""What is shown of the runs: tables that fit 80 columns, what failed, and what the server counted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from blipstream.bench.figures import LATENCIES, Figures

_WIDTH = 80
_MOST_ERRORS = 5
"""Messages that are shown of a load."""


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


def show(console: Console, results: Sequence[Result]) -> None:
    """Print the most important figures of all runs."""
    console = Console(file=console.file, width=max(console.width, _WIDTH))  # a narrower table would split numbers
    console.print(_table(None, ("answered", "failed", "requests/s", "tokens/s", "goodput/s"), map(_rates, results)))
    console.print(_table("p50 / p99 in milliseconds", LATENCIES, map(_latencies, results)))
    models = [row for result in results for row in _models(result)]
    if models:
        columns = ("model", "inferences", "mean batch", "queue ms", "compute ms")
        console.print(_table("the server's own figures", columns, models))
    for result in results:
        for note in _notes(result):
            console.print(f"{result.load}: {note}", highlight=False, markup=False)
        for fault in _faults(result.figures):
            console.print(f"{result.load}: {fault}", style="red", highlight=False, markup=False)


def _table(title: str | None, columns: Sequence[str], rows: Iterator[list[str]] | list[list[str]]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("load", *columns):
        table.add_column(column, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _rates(result: Result) -> list[str]:
    own = result.figures
    rates = (own.request_throughput, own.output_throughput, own.request_goodput)
    return [result.load, str(own.completed), str(own.failed), *map(_shown, rates)]


def _latencies(result: Result) -> list[str]:
    found = result.figures.latencies
    pairs = ((found[f"p50_{name}_ms"], found[f"p99_{name}_ms"]) for name in LATENCIES)
    return [result.load, *(" / ".join(map(_shown, pair)) for pair in pairs)]


def _models(result: Result) -> Iterator[list[str]]:
    for name, figures in result.server.get("models", {}).items():
        yield [result.load, name, str(figures["inferences"]), *(_shown(value) for value in list(figures.values())[1:])]


def _notes(result: Result) -> Iterator[str]:
    figures, counters = result.figures, result.server.get("counters", {})
    if (clients := result.setting["concurrency"]) > (requests := result.setting["requests"]):
        yield f"{requests} requests cannot keep {clients} clients busy"
    if figures.shortened:
        yield f"{figures.shortened} of {figures.completed} answers have fewer tokens than were asked for"
    if result.server.get("restarted"):
        yield "the server was restarted meanwhile, and its own figures are lost"
    if counters:
        yield "the server counted " + ", ".join(f"{name} {_shown(value)}" for name, value in counters.items())


def _faults(figures: Figures) -> Iterator[str]:
    errors = sorted(figures.errors.items(), key=lambda error: -error[1])
    for message, times in errors[:_MOST_ERRORS]:
        yield f"{times} failed: {message}"
    if len(errors) > _MOST_ERRORS:
        yield f"{sum(times for _, times in errors[_MOST_ERRORS:])} failed in other ways, all of which --json writes"


def _shown(value: float) -> str:
    if math.isnan(value):
        return "-"
    value = round(value, 6)
    return f"{value:.0f}" if value >= 1000 or value == int(value) else f"{value:.{1 if value >= 10 else 2}f}"
