"""The plot of a run: throughput, time to first token and latency over the concurrency, one line for each system."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from benchmarks.rows import Row

_COLOURS = ("#0072b2", "#d55e00", "#e69f00", "#009e73", "#cc79a7")  # told apart by the colour-blind (Okabe and Ito)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows of one run and one workload as a PNG file. Solid lines are medians, dotted ones 95th percentiles.

    Raises:
        ValueError: there are no rows, or they are of more than one run or workload.
    """
    if len({(row.date, row.workload) for row in rows}) != 1:
        raise ValueError("a plot shows the rows of exactly one run and one workload")
    figure = Figure(figsize=(13, 4.4), dpi=110, layout="constrained")
    throughput, first_token, latency = figure.subplots(1, 3)
    _lines(throughput, rows, "request_throughput")
    for axes, name in ((first_token, "time_to_first_token"), (latency, "request_latency")):
        _lines(axes, rows, f"{name}_p50_ms")
        _lines(axes, rows, f"{name}_p95_ms", dotted=True)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    throughput.set_title("requests per second, slowest to fastest round")
    first_token.set_title("time to first token, ms: p50, p95 dotted")
    latency.set_title("request latency, ms: p50, p95 dotted")
    throughput.set_ylim(bottom=0)
    figure.legend(handles=throughput.get_legend_handles_labels()[0], loc="outside lower center", ncols=5)
    row = rows[0]
    figure.suptitle(
        f"{row.checkpoint}, {row.workload} images, {row.requests} requests x {row.rounds} rounds; "
        f"{row.device}, {row.cores} cores; {row.date}",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _lines(axes: Axes, rows: Sequence[Row], name: str, *, dotted: bool = False) -> None:
    systems = list(dict.fromkeys(row.system for row in rows))
    concurrencies = sorted({row.concurrency for row in rows})
    for system, colour in zip(systems, _COLOURS, strict=False):
        own = sorted((row for row in rows if row.system == system), key=lambda row: row.concurrency)
        x = [concurrencies.index(row.concurrency) for row in own]
        y = [getattr(row, name) for row in own]
        axes.plot(x, y, "o:" if dotted else "o-", color=colour, label=system, markersize=4)
        if name == "request_throughput":
            low = [row.request_throughput - row.request_throughput_min for row in own]
            high = [row.request_throughput_max - row.request_throughput for row in own]
            axes.errorbar(x, y, yerr=[low, high], fmt="none", ecolor=colour, capsize=3)
    axes.set_xticks(range(len(concurrencies)), [str(value) for value in concurrencies])
    axes.set_xlabel("concurrency")
    axes.grid(alpha=0.3)
