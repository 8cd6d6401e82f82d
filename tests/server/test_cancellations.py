"""Clients that leave and deadlines that pass, many at once, on a server of their own.

Release 24.10 of Triton does not always survive it: a crash of Triton itself is an expected failure here, which the
summary of the run shows. Whatever else the server dies of fails the test.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from blipstream_client import AsyncClient

from blipstream.errors import DeadlineExceededError
from blipstream.triton.server import TritonServer
from tests.server.conftest import CONFIG
from tests.server.wire import PATIENCE_S, metric, wait_until
from tests.support.servers import ServerDiedError, Serving, served

pytestmark = [pytest.mark.server, pytest.mark.slow]

AT_ONCE = 20
"""More than there are slots, and as many as the queue takes besides."""
ENDLESS = {"max_tokens": 3000, "min_tokens": 3000}


@pytest.fixture(scope="module")
def serving(bundle: Path) -> Iterator[Serving]:
    with served(bundle, CONFIG) as serving:
        yield serving
        serving.kill()  # after so many cancellations a stop takes half a minute


async def test_the_server_outlives_any_number_of_cancellations(
    serving: Serving, request: pytest.FixtureRequest, images: list[bytes]
) -> None:
    try:
        with serving.lent(request.node) as server:
            await cancel(server, images, count=400)
            wait_until(lambda: metric(server, "blipstream_running_sequences") == 0)
    except ServerDiedError as death:
        if not death.is_tritons:
            raise
        pytest.xfail(str(death).partition("\n")[0])


async def cancel(server: TritonServer, images: list[bytes], count: int) -> None:
    """Half of the requests are left in mid-stream, half have a deadline of 1 to 40 ms."""
    async with AsyncClient(server.grpc_url, timeout=PATIENCE_S) as client:

        async def leave(number: int) -> None:
            async with client.stream(images[number % len(images)], max_tokens=30, min_tokens=30) as stream:
                async for chunk in stream:
                    if chunk.num_output_tokens >= number % 20:
                        break

        async def expire(number: int) -> None:
            with pytest.raises(DeadlineExceededError):
                await client.generate(images[number % len(images)], timeout=0.001 * (1 + number % 40), **ENDLESS)

        for start in range(0, count, AT_ONCE):
            await asyncio.gather(*((leave, expire)[n % 2](n) for n in range(start, start + AT_ONCE)))
        assert (await client.caption(images[0])).num_output_tokens > 0
