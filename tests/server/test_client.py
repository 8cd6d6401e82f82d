"""The project's own clients against a real server."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from blipstream_client import AsyncClient, Client, Generation, TextChunk
from PIL import Image

from blipstream.errors import (
    ClientError,
    DeadlineExceededError,
    InvalidRequestError,
    RequestRefusedError,
    ServerUnavailableError,
)
from blipstream.triton.server import TritonServer
from tests.server import wire
from tests.server.conftest import ROW_TOKENS, SLOTS
from tests.unit.client.blocking import Background, Blocking

pytestmark = [pytest.mark.server, pytest.mark.slow]

LONG: dict[str, Any] = {"max_tokens": 3000, "min_tokens": 3000}
"""Keeps a slot for longer than any test lasts."""


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    background, clients = Background(), []

    def make(url: str, **settings: Any) -> Any:
        client: Any = Client(url, **settings)
        if request.param == "async":
            client = Blocking(background, AsyncClient(url, **settings))
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.close()
    background.close()


@pytest.fixture
def client(connect: Callable[..., Any], server: TritonServer) -> Any:
    return connect(server.grpc_url, timeout=wire.PATIENCE_S)


def running(server: TritonServer) -> float:
    return wire.metric(server, "blipstream_running_sequences")


# --- the same answers as plain tritonclient --------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", "Question: what colour? Answer:"])
def test_the_answer_is_the_servers(client: Any, server: TritonServer, image: bytes, prompt: str) -> None:
    reply = wire.ask(server.grpc_url, image=image, text_input=prompt)
    expected = Generation(
        reply.text.strip(),
        reply.finish_reason,  # type: ignore[arg-type]
        reply.num_input_tokens,
        reply.num_output_tokens,
        tuple(reply.token_ids),
    )
    assert reply.token_ids
    assert client.generate(image, prompt) == expected
    chunks = list(client.stream(image, prompt))
    assert Generation.join(chunks) == expected
    assert [chunk.is_last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_every_form_of_an_image_is_the_same_image(client: Any, image: bytes, tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    file.write_bytes(image)
    expected = client.caption(image)
    assert client.caption(file) == expected
    assert client.caption(io.BytesIO(image)) == expected
    with Image.open(file) as picture:
        assert client.caption(picture) == expected


def test_ask_frames_the_question(client: Any, server: TritonServer, image: bytes) -> None:
    reply = wire.ask(server.grpc_url, image=image, text_input="Question: how many? Answer:", max_tokens=9)
    assert client.ask(image, "how many?", max_tokens=9).token_ids == tuple(reply.token_ids)


def test_options_reach_the_server(client: Any, server: TritonServer, image: bytes) -> None:
    options: dict[str, Any] = {
        "max_tokens": 12,
        "min_tokens": 6,
        "temperature": 1.5,
        "top_k": 30,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
    }
    reply = wire.ask(server.grpc_url, image=image, random_seed=2**64 - 1, return_log_probs=True, **options)
    generation = client.generate(image, seed=2**64 - 1, log_probs=True, **options)
    assert generation.token_ids == tuple(reply.token_ids)
    assert generation.log_probs == pytest.approx(reply.result.as_numpy("output_log_probs").ravel().tolist(), rel=1e-4)
    assert client.generate(image, seed=1, **options).token_ids != generation.token_ids


def test_words_reach_the_server(client: Any, server: TritonServer, image: bytes) -> None:
    text = client.generate(image, max_tokens=12, min_tokens=12).text
    assert len(text) > 4
    stopped = client.generate(image, max_tokens=12, min_tokens=12, stop=["never said", text[2:4]])
    assert stopped.finish_reason == "stop"
    assert stopped.text == text[: text.index(text[2:4])].strip()
    letters = [letter for letter in text if letter.isascii() and letter.isalnum()]
    for bad_words in (letters[:1], [letters[0], letters[-1]]):
        reply = wire.ask(server.grpc_url, image=image, max_tokens=12, bad_words=[word.encode() for word in bad_words])
        assert client.generate(image, max_tokens=12, bad_words=bad_words).text == reply.text.strip()
        assert letters[0] not in reply.text


async def test_many_streams_of_one_client(server: TritonServer, images: list[bytes]) -> None:
    async with AsyncClient(server.grpc_url, timeout=wire.PATIENCE_S) as client:

        async def caption(image: bytes) -> Generation:
            return Generation.join([chunk async for chunk in client.stream(image, max_tokens=10)])

        alone = [await caption(image) for image in images]
        together = await asyncio.gather(*(caption(image) for image in images * 3))
    assert list(together) == alone * 3


# --- cancelling and deadlines ----------------------------------------------------------------------------------------


def test_leaving_a_stream_frees_its_slot(client: Any, server: TritonServer, image: bytes) -> None:
    streams = [client.stream(image, **LONG) for _ in range(SLOTS)]
    first: list[TextChunk] = [next(stream) for stream in streams]
    assert not any(chunk.is_last for chunk in first)
    streams[0].close()
    assert client.caption(image, max_tokens=3).num_output_tokens <= 3  # there was no other slot for it
    for stream in streams:
        stream.close()
    wire.wait_until(lambda: running(server) == 0)


def test_a_deadline_frees_its_slot(client: Any, server: TritonServer, image: bytes) -> None:
    client.caption(image)
    with pytest.raises(DeadlineExceededError, match=rf"^the server at {server.grpc_url} did not .* within 0.1 s$"):
        client.generate(image, timeout=0.1, **LONG)
    wire.wait_until(lambda: running(server) == 0)


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 1.5}, "top_p must be a number from 0 to 1, but it is 1.5"),
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, but it is 0"),
        ({"temperature": float("nan")}, "temperature must be a finite number of at least 0, but it is nan"),
    ],
)
def test_the_server_checks_ranges(client: Any, image: bytes, options: dict[str, Any], message: str) -> None:
    for call in (client.generate, lambda *args, **options: list(client.stream(*args, **options))):
        with pytest.raises(RequestRefusedError) as refusal:
            call(image, **options)
        assert str(refusal.value) == message
        assert isinstance(refusal.value, InvalidRequestError)


def test_bad_images_and_prompts_are_refused(client: Any, image: bytes) -> None:
    with pytest.raises(RequestRefusedError, match="image"):
        client.caption(b"no image at all")
    with pytest.raises(RequestRefusedError, match=r"image.* bytes"):
        client.caption(bytes(6 << 20))  # larger than gRPC's own limit, so that it is the server that refuses it
    with pytest.raises(RequestRefusedError, match="tokens"):
        client.generate(image, "a " * ROW_TOKENS)
    assert client.caption(image).num_output_tokens > 0


async def test_a_server_that_is_too_busy_says_so(server: TritonServer, image: bytes) -> None:
    async with AsyncClient(server.grpc_url, timeout=wire.PATIENCE_S) as client:
        waiting = [asyncio.create_task(client.generate(image, **LONG)) for _ in range(60)]
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_EXCEPTION)
        refused = next(iter(done)).exception()
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(refused, ServerUnavailableError)
    assert str(refused).startswith(f"the server at {server.grpc_url} is unavailable: the queue is full: ")
    wire.wait_until(lambda: running(server) == 0)


def test_a_model_that_is_not_served_is_named(connect: Callable[..., Any], server: TritonServer, image: bytes) -> None:
    with pytest.raises(ClientError, match=rf"^the server at {server.grpc_url} failed the request .*'nothing'"):
        connect(server.grpc_url, model="nothing").caption(image)


def test_the_http_port_is_no_grpc_port(connect: Callable[..., Any], server: TritonServer, image: bytes) -> None:
    url = server.http_url.removeprefix("http://")
    with pytest.raises(ServerUnavailableError, match=rf"^the server at {url} is unavailable: "):
        connect(url, timeout=30).caption(image)
