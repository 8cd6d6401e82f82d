"""``blip2_unary``: what it forwards, what it refuses, and how many it takes at once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blipstream.triton.unary import _SPARE_THREADS, UnaryModel
from tests.unit.triton.fakes import Request, Response, TritonError, backend_module, make_manifest

NAME = "0123456789abcdef"


class Blip2:
    """Stands for ``blip2``: keeps what it is asked; each answer waits until it may go."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.going = threading.Event()
        self.going.set()

    def __call__(self, **request: Any) -> Blip2:
        self.asked.append(request)
        return self

    def exec(self, decoupled: bool) -> list[Response]:
        assert decoupled
        assert self.going.wait(60)
        return [Response()]


class Asked(Request):
    """A request of a client, which can wait for its answer."""

    def __init__(self, *, cancelled: bool = False, image: bytes = b"", **parameters: Any) -> None:
        inputs = {"text_input": np.array([[b"a"]], np.object_), "image": np.array([[image]], np.object_)}
        super().__init__(inputs, parameters=parameters)
        self.cancelled = cancelled

    def is_cancelled(self) -> bool:
        return self.cancelled

    def requested_output_names(self) -> list[str]:
        return ["text_output"]


@pytest.fixture
def blip2(monkeypatch: pytest.MonkeyPatch) -> Blip2:
    blip2, module = Blip2(), backend_module()
    module.InferenceRequest = blip2  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    return blip2


@pytest.fixture
def model(blip2: Blip2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UnaryModel]:
    monkeypatch.setenv("BLIPSTREAM_QUEUE_SIZE", "1")
    monkeypatch.setenv("BLIPSTREAM_MAX_IMAGE_BYTES", "9")
    make_manifest(max_sequences=1).dump(tmp_path)
    model = UnaryModel()
    model.initialize(
        {"model_name": "blip2_unary", "model_repository": str(tmp_path / "blip2_unary"), "model_version": "1"}
    )
    yield model
    blip2.going.set()
    model.finalize()


def answers(model: UnaryModel, *requests: Asked) -> list[Response]:
    """The final response of each request, after the model has ended."""
    model.execute(requests)
    model._pool.shutdown()
    return [request.sender.sent[-1][0] for request in requests]


@pytest.mark.parametrize(
    ("parameters", "fault"),
    [
        ({"max_new_tokens": 5}, "there is no option called 'max_new_tokens', and max_tokens was expected"),
        ({"colour": 1.5}, "there is no option called 'colour', and those expected are image, "),
        ({"image": bytes(9000)}, "the image has 9000 bytes, and at most 9 are accepted"),
        ({"blipstream_cancel": NAME}, "blipstream_cancel must be sent to blip2"),
        ({"blipstream_call": "x"}, "blipstream_call must be a random string of at least 16 characters, but it is 'x'"),
    ],
)
def test_a_fault_is_named_and_not_forwarded(
    model: UnaryModel, blip2: Blip2, parameters: dict[str, Any], fault: str
) -> None:
    (response,) = answers(model, Asked(**parameters))
    error = response.error()
    assert error is not None
    assert error.code() == TritonError.INVALID_ARG
    assert fault in error.message()
    assert not blip2.asked


@pytest.mark.parametrize(
    ("parameters", "timeout"),
    [({}, 0), ({"timeout": 2.5e6, "priority": 1.5}, 2_500_000), ({"timeout": 1e30}, 2**63 - 1)],
)
def test_a_timeout_is_forwarded_and_no_other_parameter(
    model: UnaryModel, blip2: Blip2, parameters: dict[str, Any], timeout: int
) -> None:
    (response,) = answers(model, Asked(**parameters, blipstream_call=NAME))
    assert not response.has_error()
    (asked,) = blip2.asked
    assert (asked["timeout"], asked["parameters"]) == (timeout, {"blipstream_call": NAME})


def test_more_than_it_can_wait_for_are_refused_at_once(model: UnaryModel, blip2: Blip2) -> None:
    blip2.going.clear()
    requests = [Asked() for _ in range(2 + _SPARE_THREADS + 1)]
    model.execute(requests)
    error = requests[-1].sender.sent[-1][0].error()  # type: ignore[union-attr]
    assert error is not None
    assert error.code() == TritonError.UNAVAILABLE
    assert "the queue is full: 10 requests are running or waiting" in error.message()
    blip2.going.set()
    model._pool.shutdown()
    assert all(not request.sender.sent[-1][0].has_error() for request in requests[:-1])  # type: ignore[union-attr]


def test_a_request_that_was_cancelled_before_is_not_forwarded(model: UnaryModel, blip2: Blip2) -> None:
    (response,) = answers(model, Asked(cancelled=True))
    values = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
    assert values["finish_reason"] == [[b"cancelled"]]
    assert not any("blipstream_call" in asked["parameters"] for asked in blip2.asked)
