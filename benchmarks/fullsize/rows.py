"""The rows of full-size models, and the plot of their stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.fullsize.stages import PREFILL, STEP
from benchmarks.rows import Setting


@dataclass(frozen=True)
class FullSizeRow(Setting):
    """One system of a run; of a system that builds nothing, the figures of a build are 0."""

    system: str
    captions: int
    caption_p50_s: float
    """Seconds of a caption of 20 tokens."""
    memory_gib: float
    """Resident, of all processes, when the captions are done; pages that the server's share count once."""
    caption_ratio: float
    """Time of a caption over that of Blipstream in the same run: how many times as long this system takes."""
    tokens_equal: float
    """Share of the tokens of transformers in fp32, up to the first that differs in each caption; NaN without fp32."""
    build_s: float
    build_peak_gib: float
    bundle_gib: float
    start_s: float
    """Seconds until the server was ready."""


@dataclass(frozen=True)
class StageRow(Setting):
    """One stage of a bundle at one batch size."""

    precision: str
    """Of ViT, Q-Former and decoder."""
    stage: str
    rows: int
    """Images, prompts or sequences at once."""
    rounds: int
    p50_ms: float
    min_ms: float
    max_ms: float
    bandwidth_gbs: float
    """GB/s that all threads together read."""
    bandwidth_share: float
    """Of a decode step: bytes of its weights over its time, over the bandwidth in the same round; 0 of other stages."""


@dataclass(frozen=True)
class QuestionRow(Setting):
    """Questions of two tokens' answers, and captions of 20 tokens, one at a time."""

    precision: str
    images: int
    first_p50_s: float
    second_p50_s: float
    second_ratio: float
    """How many times as fast another question about the same image is answered."""
    caption_p50_s: float
    overhead: float
    """What Triton, the decode loop, streaming and the client add to the engines' own time of a caption, as a share."""


def draw_stages(rows: Sequence[StageRow], setting: Setting, path: Path) -> None:
    """Draw prefill and decode step over the sequences at once as a PNG file: the last run of each precision.

    Args:
        rows: of any runs.
        setting: whose checkpoint and machine the rows are to have.
        path: the file.
    """
    alike = [row for row in rows if row.is_like(setting)]
    last = {row.precision: row.date for row in alike}
    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    for axes, stage, title in zip(figure.subplots(1, 2), (STEP, PREFILL), ("decode step", "prefill"), strict=True):
        for precision, date in last.items():
            own = [row for row in alike if (row.precision, row.date, row.stage) == (precision, date, stage)]
            axes.plot([row.rows for row in own], [row.p50_ms for row in own], "o-", label=precision, markersize=4)
            axes.fill_between(
                [row.rows for row in own], [row.min_ms for row in own], [row.max_ms for row in own], alpha=0.15
            )
        axes.set(title=f"{title}, ms; fastest to slowest round", xlabel="sequences at once")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(title="ViT/Q-Former/decoder", fontsize=8, title_fontsize=8)
    figure.suptitle(setting.title, fontsize=9)
    figure.savefig(path)
