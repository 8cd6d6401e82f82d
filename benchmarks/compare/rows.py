"""The rows of the comparison, and their plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.rows import Setting

FILE = "compare.csv"
_BAR_INCHES = 0.28
_MARGIN_INCHES = 1.1


@dataclass(frozen=True)
class ComparedRow(Setting):
    """One peer beside Blipstream, on one task; times are those of a whole round."""

    task: str
    system: str
    versions: str
    batch: int
    """Requests that the peer is given at once; Blipstream is always given all, 16 at a time."""
    requests: int
    """Of a round."""
    rounds: int
    apart: bool
    """Whether the two had the machine to themselves in turn, all rounds of one before those of the other."""
    p50_s: float
    blipstream_p50_s: float
    tokens_per_s: float
    blipstream_tokens_per_s: float
    ratio: float
    """How many times as long the peer takes in the same round, the median; so are the next two, the extremes."""
    ratio_min: float
    ratio_max: float
    reference: str
    """The system whose outputs all of a task are compared with."""
    agreement: float
    """Cosine of arrays, of the worst round; of tokens the share that is the same, up to the first that differs."""
    blipstream_agreement: float
    memory_gib: float
    """Resident when the rounds are done, of all of a system's processes."""
    blipstream_memory_gib: float


def draw(rows: Sequence[ComparedRow], setting: Setting, path: Path) -> None:
    """Draw the last rows of each task and peer as a PNG file: how many times as long each takes, with its extremes.

    Args:
        rows: of any runs.
        setting: whose checkpoint and machine the rows are to have.
        path: the file.
    """
    last = {(row.task, row.system, row.batch): row for row in rows if row.is_like(setting)}
    bars = [last[key] for key in sorted(last, reverse=True)]
    figure = Figure(figsize=(9, _MARGIN_INCHES + _BAR_INCHES * len(bars)), dpi=110, layout="constrained")
    axes = figure.subplots()
    ratios = [bar.ratio for bar in bars]
    reach = [[bar.ratio - bar.ratio_min for bar in bars], [bar.ratio_max - bar.ratio for bar in bars]]
    axes.barh(range(len(bars)), ratios, xerr=reach, color="#0072b2", ecolor="#d55e00", capsize=2)
    axes.set_yticks(range(len(bars)), [_label(bar) for bar in bars], fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("times as long as Blipstream in the same round; slowest and fastest round")
    axes.grid(alpha=0.3, axis="x")
    figure.suptitle(setting.title, fontsize=9)
    figure.savefig(path)


def _label(row: ComparedRow) -> str:
    return f"{row.task}, {row.system}" + (f", {row.batch} at once" if row.batch > 1 else "")
