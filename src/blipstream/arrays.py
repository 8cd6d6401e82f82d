"""Arrays that are kept for as long as they are used: what both the feature cache and the prefix cache are made of."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]


class ArrayCache:
    """Arrays by key, the least recently used dropped when a budget of bytes is exceeded.

    Args:
        max_bytes: the budget; an array larger than it is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[bytes, Array] = OrderedDict()
        self.num_bytes = 0
        """Bytes of the arrays that are kept."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def get(self, key: bytes) -> Array | None:
        """The array of a key, which counts as used now; None when it is not kept."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, key: bytes, array: Array) -> None:
        """Keep an array and drop old ones until the budget is met. The array becomes read-only: many share it."""
        array.flags.writeable = False
        if key in self._entries:
            self.num_bytes -= self._entries.pop(key).nbytes
        if array.nbytes > self._max_bytes:
            return
        self._entries[key] = array
        self.num_bytes += array.nbytes
        while self.num_bytes > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.num_bytes -= oldest.nbytes
