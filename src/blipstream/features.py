"""The feature cache: soft tokens of images that were seen before, and of each new image once.

Where the Q-Former reads an instruction, soft tokens belong to an image and an instruction, and what the ViT makes of an
image (``image_embeds``) is kept as well: another instruction about it runs the Q-Former alone.

Everything here belongs to one asyncio event loop and needs no lock. It knows neither Triton nor an engine.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from blipstream.arrays import ArrayCache

Features = npt.NDArray[np.float32]


class FeatureSource:
    """Features by key: from the cache, from a computation that is running already, or from a new one.

    A computation belongs to nobody who waits for it: a request that is cancelled stops waiting, and the others still
    get the result. What fails is not kept; the next request tries again.

    Args:
        cache: keeps them.
    """

    def __init__(self, cache: ArrayCache) -> None:
        self._cache = cache
        self._running: dict[bytes, asyncio.Task[Features]] = {}
        self.num_hits = 0
        """Times that no computation was needed: the features were kept, or already being computed."""
        self.num_misses = 0
        """Times that a computation was started."""

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


@dataclass(frozen=True)
class ImageFeatures:
    """What the models make of an image and an instruction."""

    soft_tokens: Features
    """(Q, D)"""
    image_embeds: Features
    """(N, D_v)"""


class SoftTokenSource:
    """Soft tokens of images: each image, and each instruction about it, is computed once. Two levels share one budget.

    Args:
        max_bytes: the cache's budget.
    """

    def __init__(self, max_bytes: int) -> None:
        self._cache = ArrayCache(max_bytes)
        self._soft_tokens = FeatureSource(self._cache)
        self._image_embeds = FeatureSource(self._cache)

    @property
    def num_bytes(self) -> int:
        """Bytes of features in the cache, of both levels."""
        return self._cache.num_bytes

    @property
    def num_hits(self) -> int:
        """Images of requests whose soft tokens were kept, or already being computed."""
        return self._soft_tokens.num_hits

    @property
    def num_misses(self) -> int:
        """Images of requests whose soft tokens had to be computed."""
        return self._soft_tokens.num_misses

    @property
    def num_embeds_hits(self) -> int:
        """The misses for which the ViT had run, or was running, for another instruction about the same image."""
        return self._image_embeds.num_hits

    async def get(self, image: bytes, compute: Callable[[], Awaitable[Features]]) -> Features:
        """Soft tokens (Q, D), read-only, of the image with this key, where they depend on nothing else.

        Raises:
            Exception: whatever ``compute`` raised, for everyone who waits for it.
        """
        return await self._soft_tokens.get(image, compute)

    async def get_instructed(
        self,
        image: bytes,
        instruction: Sequence[int],
        compute: Callable[[], Awaitable[ImageFeatures]],
        compute_soft_tokens: Callable[[Features], Awaitable[Features]],
    ) -> Features:
        """Soft tokens (Q, D), read-only, of an image and an instruction.

        Args:
            image: key of the image.
            instruction: ids of the instruction.
            compute: runs ViT and Q-Former.
            compute_soft_tokens: runs the Q-Former alone, given the image's ``image_embeds`` (N, D_v).

        Raises:
            Exception: whatever a computation raised, for everyone who waits for it.
        """

        async def read() -> Features:
            own: list[Features] = []

            async def run_both() -> Features:
                features = await compute()
                own.append(features.soft_tokens)
                return features.image_embeds

            image_embeds = await self._image_embeds.get(image, run_both)
            return own[0] if own else await compute_soft_tokens(image_embeds)

        key = hashlib.sha256(image + np.array(instruction, np.int64).tobytes()).digest()
        return await self._soft_tokens.get(key, read)


def _retrieve(task: asyncio.Task[Features]) -> None:
    """Look at the outcome, so that asyncio does not complain when everyone who waited has gone."""
    if not task.cancelled():
        task.exception()
