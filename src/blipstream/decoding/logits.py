"""The logits of a step: on the host as they are, or on a device with what greedy decoding needs of them.

A row of logits has tens of thousands of numbers, of which a greedy sequence wants the place of the largest. A graph
for a device says that itself (:attr:`~blipstream.contract.DecoderIO.argmax`), and the row is copied to the host only
for a sequence that samples, has penalties or bans, or wants log probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class DeviceLogits:
    """Logits (B, V) on a device.

    Args:
        argmax: ids (B,): the first of the largest logits of each row. Without meaning for a row that is not finite.
        sums: (B,): of each row, to tell by whether it is finite.
        fetch: copies one row (V,) to the host; until the decoder's next call.
    """

    argmax: Ids
    sums: Scores
    fetch: Callable[[int], Scores]

    def __len__(self) -> int:
        return len(self.argmax)

    def __getitem__(self, row: int) -> Scores:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} rows of logits")
        return self.fetch(row)

    def __array__(self, dtype: npt.DTypeLike = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """All rows, on the host."""
        return np.array([self.fetch(row) for row in range(len(self))], dtype or np.float32)


Logits: TypeAlias = "Scores | DeviceLogits"
"""What a decoder returns: row i is (V,), the logits of the sequence in row i."""


def reduced(logits: Logits) -> tuple[Ids, Scores]:
    """The place of the first of the largest logits of each row (B,), and the sum of each row (B,)."""
    if isinstance(logits, DeviceLogits):
        return logits.argmax, logits.sums
    return logits.argmax(axis=1), logits.sum(axis=1)
