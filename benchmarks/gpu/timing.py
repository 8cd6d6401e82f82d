"""Timing of something that is repeated."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from benchmarks.gpu.rows import Row

WARM_UP = 3
LEAST, MOST = 5, 200
"""Repetitions, whatever time they take."""


def measure(system: str, what: str, batch: int, run: Callable[[], object], *, seconds: float, inner: int = 1) -> Row:
    """Time ``run``, which returns when its work is done; a row in milliseconds.

    Args:
        system: as in the row.
        what: as in the row.
        batch: as in the row.
        run: the work.
        seconds: how long to repeat it.
        inner: how often ``run`` does the work.
    """
    for _ in range(WARM_UP):
        run()
    taken: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(taken) < LEAST or (len(taken) < MOST and time.perf_counter() < deadline):
        started = time.perf_counter()
        run()
        taken.append((time.perf_counter() - started) / inner * 1000)
    p20, p50, p80 = (round(float(value), 5) for value in np.percentile(taken, (20, 50, 80)))
    return Row(system, what, batch, "ms", p20, p50, p80, len(taken))


def rate(row: Row, amount: float, unit: str) -> Row:
    """The same as a rate: ``amount`` of ``unit`` times a second of work, over the time."""
    p20, p50, p80 = (round(amount / (value / 1000), 3) for value in (row.p80, row.p50, row.p20))
    return Row(row.system, row.what, row.batch, unit, p20, p50, p80, row.repeats)
