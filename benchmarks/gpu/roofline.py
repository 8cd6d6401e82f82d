"""How near to what the device gives at most, and whether the targets are met.

A stage takes at least as long as its bytes need at the measured copy bandwidth, and as long as its operations need at
the measured rate of matrix products; the longer of the two is its bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.huggingface import BATCHES, COMPILED, EAGER
from benchmarks.gpu.rows import CAPTION, COPY, MATMUL, QFORMER, STEP, VISION, Row, find
from benchmarks.sizes import BYTES, ModelSizes
from benchmarks.sizes import QFORMER as QFORMER_STAGE
from benchmarks.sizes import VISION as VISION_STAGE

LIMITS_SYSTEM = "torch"
BANDWIDTH_TARGET, EAGER_TARGET, COMPILED_TARGET, KERNEL_TARGET = 0.7, 5.0, 1.5, 1.3

KERNEL_COLUMNS = ("batch", "image_tokens", "dtype", "system", "sdpa_ratio", "agrees")
"""Of ``kernels.csv``: ``sdpa_ratio`` is the time of projections and scaled_dot_product_attention over that of the row's
system in the same run. Rows whose result was wrong do not count."""
KERNEL_IMAGE_TOKENS = "257"
PEER_SYSTEMS = ("sdpa", "compiled", "regrouped")
"""Systems of the kernels' benchmark that are not Blipstream's own."""


@dataclass(frozen=True)
class Limits:
    """Measured: bytes per second, and operations per second."""

    bandwidth: float
    flops: float

    @classmethod
    def of(cls, rows: Sequence[Row], dtype: str) -> Limits | None:
        """From the rows; None unless both are there."""
        copy, matmul = find(rows, LIMITS_SYSTEM, COPY), find(rows, LIMITS_SYSTEM, f"{MATMUL} {dtype}")
        return Limits(copy.p50 * 1e9, matmul.p50 * 1e12) if copy and matmul else None


@dataclass(frozen=True)
class Bound:
    """A measured stage and what it takes at least.

    Attributes:
        row: the measured time.
        bytes: that it reads at least.
        flops: operations; 0 where they do not matter.
        bound_ms: the longer of the times that they need.
    """

    row: Row
    bytes: int
    flops: int
    bound_ms: float

    @property
    def fraction(self) -> float:
        """The bound over the measured time."""
        return self.bound_ms / self.row.p50

    @property
    def by(self) -> str:
        """What the bound is of."""
        return "operations" if self.flops else "bandwidth"


def bounds(rows: Sequence[Row], details: Mapping[str, Any], limits: Limits) -> list[Bound]:
    """The roofline of one bundle: decode steps, ViT and Q-Former, as far as they were measured.

    Args:
        rows: of the part that measured it.
        details: what the part noted (:mod:`benchmarks.gpu.bundles`).
        limits: of the device.
    """
    sizes, itemsize = ModelSizes.from_json(details["sizes"]), BYTES[details["dtype"]]
    length, prompt = details["step_length"], details["prompt_length"]
    found = []
    for row in rows:
        if row.what == STEP:
            read, flops = sizes.step_bytes(row.batch, length, itemsize, prompt), 2 * row.batch * sizes.step_weights
        elif row.what == VISION:
            read, flops = sizes.stages[VISION_STAGE].stored(details["dtype"]), row.batch * sizes.vision_flops
        elif row.what == QFORMER:
            read, flops = sizes.stages[QFORMER_STAGE].stored(details["dtype"]), row.batch * sizes.qformer_flops
        else:
            continue
        found.append(_bound(row, read, flops, limits))
    return found


def _bound(row: Row, read: int, flops: int, limits: Limits) -> Bound:
    moving, computing = read / limits.bandwidth, flops / limits.flops
    return Bound(row, read, flops if computing > moving else 0, max(moving, computing) * 1000)


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes:
        name: what is wanted.
        wanted: at least.
        measured: what was found; None when it was not.
        reason: why it was not.
        percent: whether both are shares.
    """

    name: str
    wanted: float
    measured: float | None
    reason: str = ""
    percent: bool = False

    @property
    def verdict(self) -> str:
        """``met``, ``missed by ...`` or ``not measured because ...``."""
        if self.measured is None:
            return f"not measured because {self.reason}"
        if self.measured >= self.wanted:
            return "met"
        gap = self.wanted - self.measured
        return f"missed by {gap * 100:.1f} points" if self.percent else f"missed by {gap:.2f}x"

    def show(self, value: float | None) -> str:
        """A value as the table has it."""
        if value is None:
            return ""
        return f"{value:.1%}" if self.percent else f"{value:.2f}x"


def bandwidth_target(system: str, found: Sequence[Bound], reason: str) -> Target:
    """Of the decode step at batch 1."""
    steps = [bound for bound in found if bound.row.what == STEP and bound.row.batch == 1]
    value = steps[0].fraction if steps else None
    return Target(f"decode step of {system}, batch 1, of the memory bandwidth", BANDWIDTH_TARGET, value, reason, True)


def caption_targets(system: str, rows: Sequence[Row], reasons: Mapping[str, str]) -> list[Target]:
    """Of captions, over both peers, at each batch.

    Args:
        system: that has the target.
        rows: of all parts.
        reasons: by system, why its rows are not there.
    """
    targets = []
    for peer, wanted in ((EAGER, EAGER_TARGET), (COMPILED, COMPILED_TARGET)):
        for batch in BATCHES:
            ours, theirs = find(rows, system, CAPTION, batch), find(rows, peer, CAPTION, batch)
            value = theirs.p50 / ours.p50 if ours and theirs else None
            name = f"caption by {system}, batch {batch}, over {peer}"
            targets.append(Target(name, wanted, value, reasons[peer if ours else system]))
    return targets


def kernel_targets(lines: Sequence[Mapping[str, str]], dtype: str, reason: str) -> list[Target]:
    """Of the fused kernel over projections and scaled_dot_product_attention, at each batch.

    Args:
        lines: of ``kernels.csv``.
        dtype: whose rows count.
        reason: why there are none.
    """
    missing = [name for name in KERNEL_COLUMNS if lines and name not in lines[0]]
    if missing:
        lines, reason = (), f"kernels.csv has no column {', '.join(missing)}"
    targets = []
    for batch in BATCHES:
        ratios = [
            float(line["sdpa_ratio"])
            for line in lines
            if (line["batch"], line["image_tokens"], line["dtype"]) == (str(batch), KERNEL_IMAGE_TOKENS, dtype)
            and line["system"] not in PEER_SYSTEMS
            and line["agrees"] == str(True)
        ]
        name = f"fused kernel, batch {batch}, over projections and scaled_dot_product_attention"
        targets.append(
            Target(name, KERNEL_TARGET, max(ratios, default=None), reason or f"kernels.csv has no row of batch {batch}")
        )
    return targets
