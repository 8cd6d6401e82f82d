"""The asynchronous client behind a synchronous face, so that the same tests serve both clients."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

from blipstream_client import AsyncClient, Generation, TextChunk

from tests.unit.client.fake_server import PATIENCE_S

T = TypeVar("T")


class Background:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Blocking:
    """An :class:`AsyncClient`, used synchronously."""

    def __init__(self, background: Background, client: AsyncClient) -> None:
        self._background = background
        self._client = client

    def ready(self) -> bool:
        return self._background.run(self._client.ready())

    def generate(self, *args: Any, **options: Any) -> Generation:
        return self._background.run(self._client.generate(*args, **options))

    def caption(self, *args: Any, **options: Any) -> Generation:
        return self._background.run(self._client.caption(*args, **options))

    def ask(self, *args: Any, **options: Any) -> Generation:
        return self._background.run(self._client.ask(*args, **options))

    def stream(self, *args: Any, **options: Any) -> BlockingStream:
        return BlockingStream(self._background, self._client.stream(*args, **options))

    def close(self) -> None:
        self._background.run(self._client.aclose())


class BlockingStream(Iterator[TextChunk]):
    """An async stream, iterated synchronously."""

    def __init__(self, background: Background, stream: Any) -> None:
        self._background = background
        self._stream = stream

    def __next__(self) -> TextChunk:
        async def next_chunk() -> TextChunk | None:
            try:
                return await anext(self._stream)
            except StopAsyncIteration:
                return None

        chunk = self._background.run(next_chunk())
        if chunk is None:
            raise StopIteration
        return chunk

    def close(self) -> None:
        self._background.run(self._stream.aclose())

    def __enter__(self) -> BlockingStream:
        self._background.run(self._stream.__aenter__())
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._background.run(self._stream.__aexit__(*exc_info))
