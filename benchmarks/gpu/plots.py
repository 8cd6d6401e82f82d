"""The plots of the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.gpu.rows import CAPTION, PREFILL, STEP, Row

COLOURS = ("#0072b2", "#d55e00", "#e69f00", "#009e73", "#cc79a7")  # told apart by the colour-blind (Okabe and Ito)


def draw_all(rows: Sequence[Row], machine: str, folder: Path) -> list[Path]:
    """Draw what there are rows for; return the files."""
    drawn = []
    for what in (CAPTION, STEP, PREFILL):
        own = [row for row in rows if row.what == what]
        if own:
            path = folder / f"{what.replace(' ', '-')}.png"
            _draw(own, what, machine, path)
            drawn.append(path)
    return drawn


def _draw(rows: Sequence[Row], what: str, machine: str, path: Path) -> None:
    """Medians over the batch, a line for each system, with the range from the 20th to the 80th percentile."""
    figure = Figure(figsize=(7, 4.4), dpi=110, layout="constrained")
    axes = figure.subplots()
    batches = sorted({row.batch for row in rows})
    for number, system in enumerate(dict.fromkeys(row.system for row in rows)):
        own = sorted((row for row in rows if row.system == system), key=lambda row: row.batch)
        ranges = [[row.p50 - row.p20 for row in own], [row.p80 - row.p50 for row in own]]
        places = [batches.index(row.batch) for row in own]
        colour = COLOURS[number % len(COLOURS)]
        axes.errorbar(places, [row.p50 for row in own], ranges, fmt="o-", color=colour, capsize=3, label=system)
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set_xlabel("batch")
    axes.set_ylabel(f"{what}, ms")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(machine, fontsize=9)
    figure.savefig(path)
