"""What only the asynchronous client promises: it fits into an event loop."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from blipstream_client import AsyncClient

from blipstream.errors import ClientError
from tests.unit.client.fake_server import PATIENCE_S, WORDS, FakeServer

IMAGE = b"an image file"
TEXT = "".join(WORDS).strip()


@pytest.fixture
async def client(server: FakeServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.url) as client:
        yield client


async def cancellation(server: FakeServer) -> bool:
    return await asyncio.to_thread(server.cancelled.acquire, timeout=PATIENCE_S)


async def test_tasks_share_one_client(client: AsyncClient, server: FakeServer) -> None:
    count = 48
    generations = await asyncio.gather(*(client.generate(IMAGE, f"meet {count}") for _ in range(count)))
    assert [generation.text for generation in generations] == [TEXT] * count
    assert len(server.peers) == 1


async def test_cancelling_a_task_cancels_its_request(client: AsyncClient, server: FakeServer) -> None:
    task = asyncio.create_task(client.generate(IMAGE, "silent"))
    while not server.requests:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await cancellation(server)
    assert (await client.caption(IMAGE)).text == TEXT


async def test_a_wait_that_ends_cancels_the_request(client: AsyncClient, server: FakeServer) -> None:
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(client.generate(IMAGE, "silent"), 0.3)
    assert await cancellation(server)


async def test_breaking_out_of_a_loop_cancels_once_the_stream_is_gone(client: AsyncClient, server: FakeServer) -> None:
    async for chunk in client.stream(IMAGE, "slow"):
        assert chunk.text == "a"
        break
    gc.collect()
    assert await cancellation(server)


async def test_a_stream_that_is_not_read_sends_nothing(client: AsyncClient, server: FakeServer) -> None:
    stream = client.stream(IMAGE)
    await stream.aclose()
    assert [chunk async for chunk in stream] == []
    assert (await client.caption(IMAGE)).text == TEXT
    assert len(server.requests) == 1


async def test_a_stream_closed_while_its_image_is_read_ends(
    client: AsyncClient, server: FakeServer, tmp_path: Path
) -> None:
    pipe = tmp_path / "image"
    os.mkfifo(pipe)  # reading it waits for a writer
    stream = client.stream(pipe, "slow")
    reading = asyncio.create_task(anext(stream, None))
    with await asyncio.to_thread(pipe.open, "wb") as writer:  # opens once the reader has
        await stream.aclose()
        writer.write(IMAGE)
    assert await reading is None


async def test_reading_a_file_does_not_hold_up_the_loop(client: AsyncClient, tmp_path: Path) -> None:
    pipe = tmp_path / "image"
    os.mkfifo(pipe)
    slow = asyncio.create_task(client.caption(pipe))
    assert (await client.caption(IMAGE)).text == TEXT
    assert not slow.done()
    await asyncio.to_thread(pipe.write_bytes, IMAGE)
    assert (await slow).text == TEXT


def test_a_client_may_be_made_outside_a_loop(server: FakeServer) -> None:
    client = AsyncClient(server.url)

    async def caption() -> str:
        async with client:
            return (await client.caption(IMAGE)).text

    assert asyncio.run(caption()) == TEXT


async def test_a_client_that_was_never_used_can_be_closed(server: FakeServer) -> None:
    client = AsyncClient(server.url)
    await client.aclose()
    with pytest.raises(ClientError, match="is closed"):
        await client.caption(IMAGE)


def test_a_client_goes_on_in_another_event_loop(server: FakeServer) -> None:
    client = AsyncClient(server.url)

    async def caption() -> str:
        return (await client.caption(IMAGE, timeout=PATIENCE_S)).text

    assert [asyncio.run(caption()) for _ in range(2)] == [TEXT] * 2
    asyncio.run(client.aclose())
