"""The feature cache: its budget, and that each image is computed once."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from blipstream.arrays import ArrayCache
from blipstream.errors import EngineError
from blipstream.features import Features, FeatureSource, ImageFeatures, SoftTokenSource


def features(value: float = 0.0, count: int = 4) -> np.ndarray:
    """``count`` numbers of 4 bytes."""
    return np.full((1, count), value, np.float32)


class Computation:
    """Counts its calls; each waits until it is released."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls = 0
        self.release = asyncio.Event()
        self.error = error

    async def __call__(self) -> np.ndarray:
        self.calls += 1
        await self.release.wait()
        if self.error is not None:
            raise self.error
        return features(self.calls)


def test_least_recently_used_goes_first() -> None:
    cache = ArrayCache(max_bytes=48)
    for key in (b"a", b"b", b"c"):
        cache.put(key, features())
    assert cache.get(b"a") is not None
    cache.put(b"d", features())
    assert cache.get(b"b") is None
    assert all(cache.get(key) is not None for key in (b"a", b"c", b"d"))
    assert (cache.num_bytes, len(cache)) == (48, 3)


def test_a_large_entry_displaces_several() -> None:
    cache = ArrayCache(max_bytes=48)
    for key in (b"a", b"b", b"c"):
        cache.put(key, features())
    cache.put(b"d", features(count=8))
    assert [cache.get(key) is not None for key in (b"a", b"b", b"c", b"d")] == [False, False, True, True]
    assert cache.num_bytes == 48


def test_what_exceeds_the_budget_is_not_kept() -> None:
    cache = ArrayCache(max_bytes=15)
    cache.put(b"a", features())
    assert cache.get(b"a") is None
    assert cache.num_bytes == 0


def test_replacing_an_entry_counts_its_bytes_once() -> None:
    cache = ArrayCache(max_bytes=48)
    cache.put(b"a", features(1))
    cache.put(b"a", features(2, count=2))
    assert cache.num_bytes == 8
    cache.put(b"a", features(count=13))
    assert (cache.num_bytes, len(cache)) == (0, 0)


def test_entries_cannot_be_changed_by_who_uses_them() -> None:
    cache = ArrayCache(max_bytes=48)
    cache.put(b"a", features())
    entry = cache.get(b"a")
    assert entry is not None
    with pytest.raises(ValueError, match="read-only"):
        entry[0, 0] = 1


async def test_a_second_request_hits() -> None:
    cache, compute = ArrayCache(1000), Computation()
    source = FeatureSource(cache)
    compute.release.set()
    first = await source.get(b"k", compute)
    assert await source.get(b"k", compute) is first
    assert (compute.calls, source.num_hits, source.num_misses, cache.num_bytes) == (1, 1, 1, 16)


async def test_concurrent_requests_share_one_computation() -> None:
    source, compute = FeatureSource(ArrayCache(0)), Computation()
    waiting = [asyncio.create_task(source.get(b"k", compute)) for _ in range(5)]
    await asyncio.sleep(0)
    compute.release.set()
    results = await asyncio.gather(*waiting)
    assert compute.calls == 1
    assert all(result is results[0] for result in results)
    assert (source.num_hits, source.num_misses) == (4, 1)


async def test_the_first_to_ask_may_be_cancelled() -> None:
    source, compute = FeatureSource(ArrayCache(1000)), Computation()
    leader, follower = (asyncio.create_task(source.get(b"k", compute)) for _ in range(2))
    await asyncio.sleep(0)
    leader.cancel()
    await asyncio.sleep(0)
    compute.release.set()
    assert (await follower)[0, 0] == 1
    assert leader.cancelled()
    await source.get(b"k", compute)
    assert compute.calls == 1


async def test_everyone_may_be_cancelled_and_the_result_is_kept() -> None:
    source, compute = FeatureSource(ArrayCache(1000)), Computation()
    task = asyncio.create_task(source.get(b"k", compute))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    compute.release.set()
    await source.get(b"k", compute)
    assert compute.calls == 1


async def test_a_failure_reaches_everyone_and_is_not_kept() -> None:
    source, compute = FeatureSource(ArrayCache(1000)), Computation(EngineError("broken"))
    waiting = [asyncio.create_task(source.get(b"k", compute)) for _ in range(3)]
    await asyncio.sleep(0)
    compute.release.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [str(result) for result in results] == ["broken"] * 3
    compute.error = None
    assert (await source.get(b"k", compute))[0, 0] == 2


async def test_a_failure_that_nobody_waits_for_is_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    source, compute = FeatureSource(ArrayCache(1000)), Computation(EngineError("broken"))
    task = asyncio.create_task(source.get(b"k", compute))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    compute.release.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not recwarn.list


# --- instructions ----------------------------------------------------------------------------------------------------


class Models:
    """Soft tokens say which instruction they answer and, by ``image_embeds``, about which image."""

    def __init__(self, source: SoftTokenSource) -> None:
        self.source = source
        self.both: list[int] = []
        """Images that ViT and Q-Former have read."""
        self.qformer_alone: list[int] = []
        self.release = asyncio.Event()
        self.release.set()
        self.error: Exception | None = None

    async def ask(self, image: int, *instruction: int) -> Features:
        async def compute() -> ImageFeatures:
            self.both.append(image)
            await self.release.wait()
            if self.error is not None:
                raise self.error
            return ImageFeatures(self._answer(image, instruction), features(image, count=100))

        async def compute_soft_tokens(image_embeds: Features) -> Features:
            self.qformer_alone.append(int(image_embeds[0, 0]))
            return self._answer(image_embeds[0, 0], instruction)

        return await self.source.get_instructed(b"%d" % image, instruction, compute, compute_soft_tokens)

    @staticmethod
    def _answer(image: float, instruction: tuple[int, ...]) -> Features:
        return np.array([[image, *instruction]], np.float32)


async def test_another_instruction_about_an_image_runs_the_qformer_alone() -> None:
    models = Models(SoftTokenSource(10_000))
    assert (await models.ask(3, 1, 2)).tolist() == [[3, 1, 2]]
    assert (await models.ask(3, 1)).tolist() == [[3, 1]]
    assert (await models.ask(3, 1, 2)).tolist() == [[3, 1, 2]]
    assert (await models.ask(4, 1, 2)).tolist() == [[4, 1, 2]]
    assert (models.both, models.qformer_alone) == ([3, 4], [3])
    source = models.source
    assert (source.num_hits, source.num_misses, source.num_embeds_hits) == (1, 3, 1)
    assert source.num_bytes == 2 * 400 + 12 + 8 + 12


async def test_concurrent_instructions_about_one_image_share_the_vit() -> None:
    models = Models(SoftTokenSource(0))  # nothing is kept: what they share is the computation
    models.release.clear()
    waiting = [asyncio.create_task(models.ask(3, number % 3)) for number in range(6)]
    for _ in range(3):
        await asyncio.sleep(0)
    models.release.set()
    assert [found.tolist() for found in await asyncio.gather(*waiting)] == [[[3, number % 3]] for number in range(6)]
    assert (models.both, models.qformer_alone) == ([3], [3, 3])
    assert (models.source.num_hits, models.source.num_misses, models.source.num_embeds_hits) == (3, 3, 2)


async def test_the_first_instruction_may_be_cancelled() -> None:
    models = Models(SoftTokenSource(10_000))
    models.release.clear()
    leader, follower = asyncio.create_task(models.ask(3, 1)), asyncio.create_task(models.ask(3, 2))
    for _ in range(3):
        await asyncio.sleep(0)
    leader.cancel()
    models.release.set()
    assert (await follower).tolist() == [[3, 2]]
    assert (await models.ask(3, 1)).tolist() == [[3, 1]]
    assert (models.both, models.qformer_alone) == ([3], [3])


async def test_an_image_that_cannot_be_read_fails_every_instruction_and_is_not_kept() -> None:
    models = Models(SoftTokenSource(10_000))
    models.error = EngineError("broken")
    results = await asyncio.gather(models.ask(3, 1), models.ask(3, 2), return_exceptions=True)
    assert [str(result) for result in results] == ["broken", "broken"]
    models.error = None
    assert (await models.ask(3, 2)).tolist() == [[3, 2]]
    assert models.source.num_bytes == 408


async def test_an_image_that_was_dropped_is_read_again() -> None:
    models = Models(SoftTokenSource(400 + 8))
    for image in (3, 4, 3):  # there is room for one of them
        await models.ask(image, 1)
        await models.ask(image, 2)
    assert (models.both, models.qformer_alone) == ([3, 4, 3], [3, 4, 3])
    assert models.source.num_bytes == 408
