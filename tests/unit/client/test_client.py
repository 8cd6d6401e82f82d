"""Both clients against a real gRPC server: answers, streams, cancellation, deadlines, failures, retries."""

from __future__ import annotations

import gc
import re
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import grpc
import pytest
from blipstream_client import Generation, transport

from blipstream.errors import (
    ClientError,
    DeadlineExceededError,
    InvalidImageError,
    InvalidRequestError,
    RequestRefusedError,
    ServerUnavailableError,
)
from tests.unit.client.fake_server import INPUT_TOKENS, PATIENCE_S, WORDS, FakeServer, wait_until

IMAGE = b"an image file"
TEXT = "".join(WORDS).strip()
TOKENS = (10, 11, 12, 13)


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


# --- answers ---------------------------------------------------------------------------------------------------------


def test_generate_gives_the_whole_text(client: Any, server: FakeServer) -> None:
    assert client.generate(IMAGE, "a photo of") == Generation(TEXT, "eos", INPUT_TOKENS, len(TOKENS), TOKENS)
    inputs = server.inputs()
    assert inputs["image"] == ("BYTES", [1, 1], [IMAGE])
    assert inputs["text_input"] == ("BYTES", [1, 1], [b"a photo of"])
    assert inputs["stream"] == ("BOOL", [1, 1], [False])
    assert server.requests[-1].model_name == "blip2"


def test_a_stream_gives_the_text_piece_by_piece(client: Any, server: FakeServer) -> None:
    chunks = list(client.stream(IMAGE, "a photo of"))
    assert [chunk.text for chunk in chunks] == ["a", *WORDS[1:], ""]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, None, "eos"]
    assert [chunk.is_last for chunk in chunks] == [False, False, False, True]
    assert [chunk.num_output_tokens for chunk in chunks] == [1, 2, 3, 4]
    assert Generation.join(chunks) == client.generate(IMAGE, "a photo of")
    assert server.inputs(0)["stream"][2] == [True]


def test_caption_sends_an_empty_prompt(client: Any, server: FakeServer, tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    file.write_bytes(IMAGE)
    assert client.caption(file, max_tokens=7).text == TEXT
    assert server.inputs()["text_input"][2] == [b""]
    assert server.inputs()["image"][2] == [IMAGE]
    assert server.inputs()["max_tokens"] == ("INT32", [1, 1], [7])


def test_ask_puts_the_question_into_a_template(client: Any, server: FakeServer) -> None:
    assert client.ask(IMAGE, "What {is} it?").text == TEXT
    assert server.inputs()["text_input"][2] == [b"Question: What {is} it? Answer:"]
    client.ask(IMAGE, "What is it?", template="Q: {} A:", seed=3)
    assert server.inputs()["text_input"][2] == [b"Q: What is it? A:"]
    client.ask(IMAGE, "What is it?", template="{}")
    assert server.inputs()["text_input"][2] == [b"What is it?"]


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("{}", b"why?"),
        ("Question: {} Short answer:", b"Question: why? Short answer:"),
        (None, b"Question: why? Answer:"),  # a server of another build
        (grpc.StatusCode.UNIMPLEMENTED, b"Question: why? Answer:"),
        (grpc.StatusCode.PERMISSION_DENIED, b"Question: why? Answer:"),
    ],
)
def test_ask_learns_the_template_of_the_checkpoint_once(
    template: str | grpc.StatusCode | None, prompt: bytes, client: Any, server: FakeServer
) -> None:
    server.template = template
    for _ in range(2):
        client.ask(IMAGE, "why?")
        assert server.inputs()["text_input"][2] == [prompt]
    assert server.configs == ["blip2"]


def test_ask_fails_with_the_call_for_the_template(client: Any, server: FakeServer) -> None:
    server.template = grpc.StatusCode.INTERNAL
    with pytest.raises(ClientError, match=r"failed the request \(INTERNAL\): no configuration"):
        client.ask(IMAGE, "why?")
    assert server.requests == []


def test_log_probs_come_with_their_tokens(client: Any) -> None:
    generation = client.generate(IMAGE, log_probs=True)
    assert generation.log_probs == (-0.5,) * len(TOKENS)
    assert Generation.join(list(client.stream(IMAGE, log_probs=True))) == generation
    assert client.generate(IMAGE).log_probs == ()


def test_another_model_can_be_asked(connect: Callable[..., Any], server: FakeServer) -> None:
    connect(server.url, model="other").caption(IMAGE)
    assert server.requests[-1].model_name == "other"


@pytest.mark.parametrize("size", [6 << 20, 40 << 20])
def test_messages_may_be_larger_than_grpcs_default(connect: Callable[..., Any], size: int) -> None:
    server = FakeServer(echo_bytes=6 << 20)
    try:
        image = bytes(size)
        generation = connect(server.url).caption(image)
        assert server.inputs()["image"][2] == [image]
        assert generation.text == "x" * (6 << 20)
    finally:
        server.close()


# --- many at once ----------------------------------------------------------------------------------------------------


def test_many_streams_share_one_connection(client: Any, server: FakeServer) -> None:
    count = 32

    def ask(_: int) -> str:
        return "".join(chunk.text for chunk in client.stream(IMAGE, f"meet {count}"))  # all or none are answered

    with ThreadPoolExecutor(count) as pool:
        assert list(pool.map(ask, range(count))) == [TEXT] * count
    assert len(server.peers) == 1


# --- cancelling ------------------------------------------------------------------------------------------------------


def test_closing_a_stream_cancels_its_request_alone(client: Any, server: FakeServer) -> None:
    kept, left = client.stream(IMAGE, "slow"), client.stream(IMAGE, "slow")
    next(kept)
    next(left)
    left.close()
    assert server.cancelled.acquire(timeout=PATIENCE_S)
    assert list(left) == []
    assert not server.cancelled.acquire(timeout=0.2)
    kept.close()
    assert server.cancelled.acquire(timeout=PATIENCE_S)


def test_leaving_a_with_block_cancels(client: Any, server: FakeServer) -> None:
    with client.stream(IMAGE, "slow") as stream:
        next(stream)
    assert server.cancelled.acquire(timeout=PATIENCE_S)


def test_dropping_a_stream_cancels(client: Any, server: FakeServer) -> None:
    stream = client.stream(IMAGE, "slow")
    next(stream)
    del stream
    gc.collect()
    assert server.cancelled.acquire(timeout=PATIENCE_S)


def test_closing_a_finished_stream_does_nothing(client: Any) -> None:
    with client.stream(IMAGE) as stream:
        assert len(list(stream)) == 4
        stream.close()
    assert client.caption(IMAGE).text == TEXT


def test_closing_a_stream_ends_the_wait_for_its_next_chunk(client: Any, server: FakeServer) -> None:
    stream = client.stream(IMAGE, "slow")
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(list, stream)
        stream.close()
        assert rest.result(PATIENCE_S) == []


def test_closing_the_client_ends_its_streams(client: Any, server: FakeServer) -> None:
    stream = client.stream(IMAGE, "slow")
    next(stream)
    client.close()
    assert server.cancelled.acquire(timeout=PATIENCE_S)
    with pytest.raises(ClientError):
        next(stream)
    with pytest.raises(ClientError, match=rf"^the client of {server.url} is closed$"):
        client.caption(IMAGE)


# --- deadlines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["silent", "slow"])
def test_a_deadline_ends_the_request_on_both_sides(client: Any, server: FakeServer, prompt: str) -> None:
    with pytest.raises(DeadlineExceededError, match=rf"^the server at {server.url} did not complete .* within 0.3 s$"):
        client.generate(IMAGE, prompt, timeout=0.3)
    assert server.cancelled.acquire(timeout=PATIENCE_S)


def test_a_deadline_holds_for_the_whole_stream(client: Any) -> None:
    stream = client.stream(IMAGE, "slow", timeout=0.3)
    assert next(stream).text == "a"
    with pytest.raises(TimeoutError):
        next(stream)


def test_a_client_has_a_timeout_for_requests_without_one(connect: Callable[..., Any], server: FakeServer) -> None:
    client = connect(server.url, timeout=0.2)
    with pytest.raises(DeadlineExceededError, match=r"within 0\.2 s"):
        client.generate(IMAGE, "silent")
    with pytest.raises(DeadlineExceededError, match=r"within 0\.4 s"):
        client.generate(IMAGE, "silent", timeout=0.4)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "1", True])
def test_a_timeout_is_a_positive_number(connect: Callable[..., Any], server: FakeServer, timeout: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"^timeout must be a "):
        connect(server.url).generate(IMAGE, timeout=timeout)
    with pytest.raises(InvalidRequestError, match=r"^timeout must be a "):
        connect(server.url, timeout=timeout)


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "kind", "expected"),
    [
        ("INVALID_ARGUMENT: top_k must be: small", RequestRefusedError, "top_k must be: small"),
        (
            "UNAVAILABLE: the queue is full",
            ServerUnavailableError,
            "the server at {url} is unavailable: the queue is full",
        ),
        ("INTERNAL: it broke", ClientError, "the server at {url} failed the request (INTERNAL): it broke"),
        ("why: not", ClientError, "the server at {url} failed the request (UNKNOWN): why: not"),
    ],
)
def test_a_failed_request_says_why(
    client: Any, server: FakeServer, message: str, kind: type[ClientError], expected: str
) -> None:
    for call in (client.generate, lambda *request: list(client.stream(*request))):
        with pytest.raises(ClientError) as failure:
            call(IMAGE, f"fail {message}")
        assert type(failure.value) is kind
        assert str(failure.value) == expected.format(url=server.url)


def test_a_refused_request_is_an_invalid_request(client: Any) -> None:
    with pytest.raises(InvalidRequestError):
        client.generate(IMAGE, "fail INVALID_ARGUMENT: no")


def test_a_broken_call_says_why(client: Any, server: FakeServer) -> None:
    stream = client.stream(IMAGE, "break DATA_LOSS")
    assert next(stream).text == "a"
    with pytest.raises(ClientError, match=rf"^the server at {server.url} failed the request \(DATA_LOSS\): it broke$"):
        next(stream)


def test_a_stream_that_ends_too_early_is_an_error(client: Any, server: FakeServer) -> None:
    with pytest.raises(
        ClientError, match=rf"^the server at {server.url} ended the stream before the text was complete$"
    ):
        client.generate(IMAGE, "cut")
    stream = client.stream(IMAGE, "cut")
    assert next(stream).text == "a"
    with pytest.raises(ClientError, match="before the text was complete"):
        next(stream)


def test_a_server_that_is_not_blipstreams_is_told_apart(client: Any, server: FakeServer) -> None:
    with pytest.raises(ClientError, match=rf"{server.url} lacks finish_reason: is the model served there Blipstream's"):
        client.generate(IMAGE, "bare")
    with pytest.raises(ClientError, match="for the reason 'tired', which this client does not know: it knows eos, "):
        client.generate(IMAGE, "reason tired")


def test_an_unreachable_server_is_named(connect: Callable[..., Any]) -> None:
    url = f"127.0.0.1:{free_port()}"
    with pytest.raises(
        ServerUnavailableError, match=rf"^the server at {url} is unavailable: nothing listens there; `blipstream serve"
    ):
        connect(url).caption(IMAGE)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        *[(url, "$") for url in ("", "http://localhost:8000", "grpc://a:1", "::1:8001", "a b:1", " localhost:1", None)],
        *[(url, ", which has no port$") for url in ("localhost", "[::1]", "dns:///localhost", "dns:host")],
        *[(url, ", whose port is not from 1 to 65535$") for url in ("localhost:99999", "localhost:0")],
    ],
)
def test_a_wrong_url_is_refused(connect: Callable[..., Any], url: str, reason: str) -> None:
    message = rf"must be HOST:PORT of its gRPC endpoint, but it is {re.escape(repr(url))}{reason}"
    with pytest.raises(InvalidRequestError, match=message):
        connect(url)


@pytest.mark.parametrize(
    ("url", "loopback"),
    [
        *[(url, True) for url in ("localhost:1", "127.0.0.9:1", "[::1]:1", "dns:///localhost:1", "ipv6:[::1]:1")],
        *[(url, False) for url in ("example.org:1", "10.0.0.1:1", "[fe80::1]:1", "unix:/socket")],
    ],
)
def test_only_this_machine_is_reached_past_a_proxy(url: str, loopback: bool) -> None:
    assert ("grpc.enable_http_proxy", int(not loopback)) in transport.channel_options(transport.check_url(url))


def test_a_proxy_is_not_asked_for_this_machine(
    connect: Callable[..., Any], server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert connect(server.url).caption(IMAGE).text == TEXT
    with pytest.raises(ServerUnavailableError, match=r"server at 192\.0\.2\.1:1 .*grpc_proxy names a proxy"):
        connect("192.0.2.1:1").caption(IMAGE)


def test_a_server_of_another_protocol_is_told_apart(connect: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    with other.accept()[0] as connection:
                        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                        connection.recv(100)

        Thread(target=serve, daemon=True).start()
        with pytest.raises(ServerUnavailableError, match="does not speak gRPC"):
            connect(f"127.0.0.1:{other.getsockname()[1]}").caption(IMAGE)


def test_ready(connect: Callable[..., Any], server: FakeServer) -> None:
    assert connect(server.url).ready()
    assert not connect(server.url, model="other").ready()
    assert not connect(f"127.0.0.1:{free_port()}").ready()


def test_bad_requests_are_refused_before_they_are_sent(client: Any, server: FakeServer, tmp_path: Path) -> None:
    for call in (client.generate, client.caption, lambda image, **options: list(client.stream(image, **options))):
        with pytest.raises(TypeError, match="unknown decoding option 'max_token': did you mean 'max_tokens'"):
            call(IMAGE, max_token=3)
        with pytest.raises(InvalidRequestError, match="max_tokens must be an integer, but it is 'three'"):
            call(IMAGE, max_tokens="three")
        with pytest.raises(InvalidImageError, match=r"missing\.png' cannot be read: No such file"):
            call(tmp_path / "missing.png")
    with pytest.raises(InvalidRequestError, match=r"template must hold \{\} exactly once, but it is 'Q:'"):
        client.ask(IMAGE, "What is it?", template="Q:")
    assert server.requests == []


# --- retries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 5 << 20])
def test_a_call_that_was_turned_away_is_sent_again(client: Any, server: FakeServer, size: int) -> None:
    server.unavailable = 3
    assert client.caption(bytes(size)).text == TEXT
    assert len(server.metadata) == 4
    assert len(server.requests) == 1


def test_retries_end(client: Any, server: FakeServer) -> None:
    server.unavailable = 100
    with pytest.raises(ServerUnavailableError, match=rf"^the server at {server.url} is unavailable: not yet$"):
        client.caption(IMAGE)
    assert len(server.metadata) == 4


def test_nothing_is_sent_again_once_text_has_come(client: Any, server: FakeServer) -> None:
    stream = client.stream(IMAGE, "break UNAVAILABLE")
    assert next(stream).text == "a"
    with pytest.raises(ServerUnavailableError, match="it broke"):
        next(stream)
    assert len(server.requests) == 1


def test_a_client_outlives_a_restart_of_the_server(connect: Callable[..., Any]) -> None:
    port = free_port()
    client = connect(f"127.0.0.1:{port}")
    for _ in range(2):
        server = FakeServer(port)

        def answers() -> bool:
            try:
                return bool(client.caption(IMAGE).text == TEXT)
            except ServerUnavailableError:
                return False

        try:
            wait_until(answers)
        finally:
            server.close()
        with pytest.raises(ServerUnavailableError):
            client.caption(IMAGE)


def test_a_call_ends_with_its_connection(connect: Callable[..., Any]) -> None:
    """A call that begins while the server ends the connection is answered or fails before its deadline."""
    port = free_port()
    client = connect(f"127.0.0.1:{port}", timeout=10)
    for _ in range(3):
        server = FakeServer(port)
        calls = ThreadPoolExecutor(16)
        try:
            outcomes = [calls.submit(client.caption, IMAGE) for _ in range(16)]
        finally:
            server.close()
            calls.shutdown()
        for outcome in outcomes:
            error = outcome.exception(timeout=PATIENCE_S)
            assert error is None or (isinstance(error, ClientError) and not isinstance(error, DeadlineExceededError))
