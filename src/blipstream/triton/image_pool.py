"""Processes that decode images, so that no image can hold up or end the server, whatever it costs.

There are two lanes. The quick one takes no image of many bytes or pixels, and its processes end when an image takes
them long: such images go to the slow lane, which has fewer processes of a lower priority, and the limits that the
operator set. So pixels in flight are bounded by the number of processes, and a cheap image never waits for
a costly one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

import numpy as np
import numpy.typing as npt

from blipstream.errors import BlipstreamError, EngineError, InvalidImageError, ServerBusyError
from blipstream.image_files import ImageLimits
from blipstream.preprocess import CostlyImageError, ImageTransform, limit_pillow, readable_formats

QUICK_PIXELS = 12_500_000
"""A phone's photograph; larger ones are decoded in the slow lane."""
QUICK_SECONDS = 0.5
QUICK_BYTES = 8 << 20
SLOW_NICENESS = 5
MAX_SLOW = 48
"""Images in the slow lane, waiting or not; further ones are refused, so that quick ones find a thread that is free."""
_PARTING_S = 1.0
"""Time for a process to end by itself."""
_PATIENCE_S = 120.0
"""Time, whatever else the machine does, after which a process that does not answer is taken to hang."""


@dataclass(frozen=True)
class Lane:
    """What the processes of a lane do, and within which limits."""

    transform: ImageTransform
    limits: ImageLimits
    pixels: int
    seconds: float
    """Of CPU time, for an image."""
    niceness: int = 0


class ImagePool:
    """Decodes and resizes images in the two lanes. Any thread may call it.

    Args:
        transform: how an image becomes pixels.
        limits: on bytes and pixels.
        seconds: CPU time for an image.
        size: processes of the quick lane; the slow one has half as many.
    """

    def __init__(self, transform: ImageTransform, limits: ImageLimits, seconds: float, size: int) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process would have a part of Triton in it
        self._transform, self._seconds = transform, seconds
        quick = Lane(transform, limits, min(QUICK_PIXELS, limits.max_pixels), min(QUICK_SECONDS, seconds))
        slow = Lane(transform, limits, limits.max_pixels, seconds, SLOW_NICENESS)
        self._quick, self._slow = _Workers(context, quick, size), _Workers(context, slow, max(1, size // 2))
        self._quick.start()
        self._slow_places = threading.BoundedSemaphore(MAX_SLOW)

    def decode(self, file: bytes) -> npt.NDArray[np.float32]:
        """Decode an image file and transform it; return (3, S, S) float32. Blocks for as long as that takes.

        Raises:
            InvalidImageError: it cannot be decoded, or costs more than the limits allow.
            ServerBusyError: it is costly, and too many such images are waiting.
            EngineError: decoding failed, which is not the image's fault.
        """
        try:
            pixels = self._quick.decode(file) if len(file) <= QUICK_BYTES else None
        except CostlyImageError:
            pixels = None
        return self._transform.normalise(self._decode_slowly(file) if pixels is None else pixels)

    def close(self) -> None:
        """End the processes."""
        self._quick.close()
        self._slow.close()

    def _decode_slowly(self, file: bytes) -> npt.NDArray[np.uint8]:
        if not self._slow_places.acquire(blocking=False):
            raise ServerBusyError(f"{MAX_SLOW} images of many pixels or of long decoding are waiting already")
        try:
            return self._slow.decode(file)
        except CostlyImageError:
            raise InvalidImageError(
                f"the image of {len(file)} bytes takes more than {self._seconds:g} s of CPU time to decode, or more "
                "memory than there is (`--max-image-seconds` of the server)"
            ) from None
        finally:
            self._slow_places.release()


class _Workers:
    """The processes of a lane."""

    def __init__(self, context: SpawnContext, lane: Lane, size: int) -> None:
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._all = [_Worker(context, lane) for _ in range(size)]
        for worker in self._all:
            self._idle.put(worker)

    def start(self) -> None:
        """Start the processes, which otherwise start when they are needed."""
        for worker in self._all:
            worker.start()

    def decode(self, file: bytes) -> npt.NDArray[np.uint8]:
        worker = self._idle.get()
        try:
            return worker.decode(file)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        for worker in self._all:
            worker.close()


class _Worker:
    """One process, which is replaced when it has ended. One thread at a time uses it."""

    def __init__(self, context: SpawnContext, lane: Lane) -> None:
        self._context, self._lane = context, lane
        self._process: SpawnProcess | None = None

    def decode(self, file: bytes) -> npt.NDArray[np.uint8]:
        """Decode and resize an image file; return (S, S, 3) uint8.

        Raises:
            CostlyImageError: it is over the lane's limits, or the process ended over it.
            BlipstreamError: as the process says.
        """
        if self._process is None or not self._process.is_alive():
            self.start()
        try:
            self._connection.send_bytes(file)
            if not self._connection.poll(_PATIENCE_S):
                raise EOFError
            answer: npt.NDArray[np.uint8] | BlipstreamError | None = self._connection.recv()
        except (EOFError, OSError):
            status = self.close()
            if status > 0:
                raise EngineError(f"a process that decodes images ended with status {status}") from None
            raise CostlyImageError from None
        if answer is None:
            raise CostlyImageError
        if isinstance(answer, BlipstreamError):
            raise answer
        return answer

    def close(self) -> int:
        """End the process, whatever it does, and return its status: negative after a signal."""
        if self._process is None:
            return 0
        process, self._process = self._process, None
        self._connection.close()
        process.join(_PARTING_S)
        process.kill()
        process.join()
        return process.exitcode or 0

    def start(self) -> None:
        """Start the process; it is ready after some tenths of a second, and what is sent to it waits."""
        self._connection, far_end = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(far_end, self._lane), daemon=True)
        self._process.start()
        far_end.close()


# --- in the process --------------------------------------------------------------------------------------------------


def _serve(connection: Connection, lane: Lane) -> None:
    """Decode what comes, until the other end is closed."""
    os.nice(lane.niceness)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff and its like write a line for each fault in a file
    limit_pillow(lane.limits)
    readable_formats()
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send(_answer(connection.recv_bytes(), lane))


def _answer(file: bytes, lane: Lane) -> Any:
    """Pixels (S, S, 3) uint8, an error, or None for an image over the lane's limits."""
    try:
        with _cpu_time(lane.seconds):
            return lane.transform.decode_resized(file, lane.limits, lane.pixels)
    except CostlyImageError:
        return None
    except BlipstreamError as error:
        return type(error)(str(error))  # without its cause, which need not travel
    except Exception as error:
        return EngineError(f"the image could not be transformed: {error!r}")


@contextlib.contextmanager
def _cpu_time(seconds: float) -> Iterator[None]:
    """End this process when it spends more; no Python code could interrupt a decoder that is under way."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
