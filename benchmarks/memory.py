"""Memory of processes."""

from __future__ import annotations

import psutil


def resident(parent: psutil.Process) -> int:
    """Bytes of a process and of all that it has started; a page that several share counts once."""
    return sum(process.memory_full_info().pss for process in (parent, *parent.children(recursive=True)))


def gib(count: float) -> float:
    """Bytes as GiB, as rows have them."""
    return round(count / (1 << 30), 2)
