"""Loss curves of the stages as PNG files."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np

from .training import read_log

mpl.use("Agg")
from matplotlib import pyplot as plt  # the backend must be chosen first

STAGES = (
    "vision",
    "language",
    "language_llama",
    "language_t5",
    "language_t5_relations",
    "language_t5_more",
    "stage_one",
    "stage_two",
    "stage_two_t5",
    "stage_two_instruct",
)


def draw(work: Path, folder: Path) -> None:
    """One plot for each stage that has a log in ``work``: what it logged against the step, smoothed."""
    folder.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        log = read_log(work / f"{stage}.jsonl")
        if log:
            _draw_one(stage, log, folder / f"{stage}.png")


def _draw_one(stage: str, log: list[dict[str, float]], path: Path) -> None:
    steps = [entry["step"] for entry in log]
    names = [name for name in log[-1] if name not in ("step", "seconds")]
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for name in names:
        values = np.array([entry[name] for entry in log])
        width = min(9, len(values))
        padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
        axes.plot(steps, np.convolve(padded, np.ones(width) / width, "valid"), label=name, linewidth=1.2)
    axes.set(title=stage.replace("_", " "), xlabel="step", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)
