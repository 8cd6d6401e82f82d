"""Sizes in bytes, as people read them."""

from __future__ import annotations

GIB = 1 << 30
_KIB = 1024


def format_bytes(count: float) -> str:
    """Such as ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < _KIB:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= _KIB
    return f"{count:.1f} GiB"
