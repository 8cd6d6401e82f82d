"""Who waits, for how long, and who gives up: slots, cancelling, timeouts, a full queue."""

from __future__ import annotations

import re

import pytest
import tritonclient.grpc as triton

from blipstream.triton.server import TritonServer
from tests.server.conftest import QUEUE_SIZE, SLOTS
from tests.server.wire import Stream, ask, ask_unary, infer_inputs, metric, occupied, refusal, settled, wait_until

pytestmark = pytest.mark.server

UNAVAILABLE = "StatusCode.UNAVAILABLE"


def idle(server: TritonServer) -> bool:
    gauges = ("blipstream_running_sequences", "blipstream_waiting_requests")
    return all(metric(server, name) == 0 for name in gauges)


def cancelled(server: TritonServer) -> float:
    return metric(server, "blipstream_requests_total", outcome="cancelled")


@pytest.fixture(autouse=True)
def _idle_before(server: TritonServer) -> None:
    """Each test counts from a server that has nothing to do and has told so."""
    wait_until(lambda: idle(server))
    settled(server, "blipstream_requests_total")


def test_cancelling_a_stream_frees_its_slot(server: TritonServer, image: bytes) -> None:
    """A request that waits for a slot gets one as soon as a stream is cancelled, while the other streams go on."""
    before = cancelled(server)
    with (
        occupied(server, SLOTS, image) as streams,
        Stream(server.grpc_url, image=image, max_tokens=3) as waiting,
    ):
        # both at once: an earlier reading also has one that waits, the first stream for its image
        wait_until(
            lambda: (
                metric(server, "blipstream_running_sequences") == SLOTS
                and metric(server, "blipstream_waiting_requests") == 1
            )
        )
        streams[0].cancel()
        assert waiting.next().num_output_tokens == 3
        assert not any(stream.is_final for stream in streams[1:])
        assert all(stream.next().finish_reason == "" for stream in streams[1:])
    wait_until(lambda: idle(server) and cancelled(server) == before + SLOTS)


def test_cancelling_a_waiting_request(server: TritonServer, image: bytes) -> None:
    before = cancelled(server)
    with occupied(server, SLOTS, image):
        waiting = Stream(server.grpc_url, image=image)
        wait_until(lambda: metric(server, "blipstream_waiting_requests") == 1)
        waiting.close()
        wait_until(lambda: metric(server, "blipstream_waiting_requests") == 0)
        assert cancelled(server) <= before + 1
    wait_until(lambda: idle(server) and cancelled(server) == before + SLOTS + 1)


def test_cancelling_a_unary_request(server: TritonServer, image: bytes) -> None:
    """A unary client that gives up: its sequence, running in another model, ends as well."""
    before = cancelled(server)
    with triton.InferenceServerClient(server.grpc_url) as client:
        inputs = infer_inputs(image=image, max_tokens=100_000, min_tokens=100_000)
        call = client.async_infer("blip2_unary", inputs, lambda *_: None)
        wait_until(lambda: metric(server, "blipstream_running_sequences") == 1)
        call.cancel()
        wait_until(lambda: idle(server) and cancelled(server) == before + 1)


def test_a_request_that_waits_too_long_is_answered_so(server: TritonServer, image: bytes) -> None:
    before = metric(server, "blipstream_requests_total", outcome="timeout")
    with occupied(server, SLOTS, image) as streams:
        with Stream(server.grpc_url, timeout_us=200_000, image=image) as late:
            _, message = refusal(late.next)
        assert re.fullmatch(
            r"UNAVAILABLE: the request waited \d+\.\d{3} s for a slot, and its timeout is 0\.200 s", message
        )
        status, message = refusal(lambda: ask_unary(server.grpc_url, timeout_us=300_000, image=image))
        assert status == UNAVAILABLE
        assert message.endswith("its timeout is 0.300 s")
        assert all(stream.next().finish_reason == "" for stream in streams)
    wait_until(lambda: metric(server, "blipstream_requests_total", outcome="timeout") == before + 2)


def test_a_timeout_bounds_the_waiting_and_not_the_answer(server: TritonServer, image: bytes) -> None:
    """A request that got its slot in time may take longer than its timeout."""
    wait_until(lambda: idle(server))
    ask(server.grpc_url, image=image, max_tokens=1)
    with Stream(server.grpc_url, timeout_us=1_000_000, image=image, max_tokens=3000, min_tokens=3000) as stream:
        assert stream.next().num_output_tokens == 3000


def test_a_full_queue_refuses(server: TritonServer, image: bytes) -> None:
    with occupied(server, SLOTS, image):
        waiting = [Stream(server.grpc_url, image=image, max_tokens=1) for _ in range(QUEUE_SIZE)]
        wait_until(lambda: metric(server, "blipstream_waiting_requests") == QUEUE_SIZE)
        status, message = refusal(lambda: ask_unary(server.grpc_url, image=image, max_tokens=1))
        assert status == UNAVAILABLE
        assert message.endswith(f"the queue is full: {SLOTS + QUEUE_SIZE} requests are running or waiting")
    for stream in waiting:
        assert stream.next().num_output_tokens == 1
        stream.close()
    assert ask(server.grpc_url, image=image, max_tokens=1).num_output_tokens == 1
