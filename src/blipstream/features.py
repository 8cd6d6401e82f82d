"""The feature cache: soft tokens of images that were seen before, and of each new image once.

Everything here belongs to one asyncio event loop and needs no lock. It knows neither Triton nor an engine.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable

import numpy as np
import numpy.typing as npt

Features = npt.NDArray[np.float32]


class FeatureCache:
    """Arrays by key, the least recently used dropped when a budget of bytes is exceeded.

    Args:
        max_bytes: the budget; an array larger than it is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[bytes, Features] = OrderedDict()
        self.num_bytes = 0
        """Bytes of the arrays that are kept."""

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Features | None:
        """The array of a key, which counts as used now; None when it is not kept."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, key: bytes, features: Features) -> None:
        """Keep an array and drop old ones until the budget is met. The array becomes read-only: many share it."""
        features.flags.writeable = False
        if key in self._entries:
            self.num_bytes -= self._entries.pop(key).nbytes
        if features.nbytes > self._max_bytes:
            return
        self._entries[key] = features
        self.num_bytes += features.nbytes
        while self.num_bytes > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.num_bytes -= oldest.nbytes


class FeatureSource:
    """Features by key: from the cache, from a computation that is running already, or from a new one.

    A computation belongs to nobody who waits for it: a request that is cancelled stops waiting, and the others still
    get the result. What fails is not kept; the next request tries again.

    Args:
        max_bytes: the cache's budget.
    """

    def __init__(self, max_bytes: int) -> None:
        self._cache = FeatureCache(max_bytes)
        self._running: dict[bytes, asyncio.Task[Features]] = {}
        self.num_hits = 0
        """Requests that needed no computation of their own: the features were kept, or already being computed."""
        self.num_misses = 0
        """Requests that started a computation."""

    @property
    def num_bytes(self) -> int:
        """Bytes of features in the cache."""
        return self._cache.num_bytes

    async def get(self, key: bytes, compute: Callable[[], Awaitable[Features]]) -> Features:
        """Return the features of a key (read-only), calling ``compute`` when nobody has.

        Raises:
            Exception: whatever ``compute`` raised, for everyone who waits for it.
        """
        features = self._cache.get(key)
        if features is not None:
            self.num_hits += 1
            return features
        task = self._running.get(key)
        if task is not None:
            self.num_hits += 1
        else:
            self.num_misses += 1
            task = self._running[key] = asyncio.ensure_future(self._compute(key, compute))
            task.add_done_callback(_retrieve)
        return await asyncio.shield(task)

    async def _compute(self, key: bytes, compute: Callable[[], Awaitable[Features]]) -> Features:
        try:
            features = await compute()
            self._cache.put(key, features)
            return features
        finally:
            del self._running[key]


def _retrieve(task: asyncio.Task[Features]) -> None:
    """Look at the outcome, so that asyncio does not complain when everyone who waited has gone."""
    if not task.cancelled():
        task.exception()
