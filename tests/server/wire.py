"""Talking to a server by plain ``tritonclient`` and HTTP, as anyone may, without the project's own client."""

from __future__ import annotations

import base64
import io
import json
import queue
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from PIL import Image
from tritonclient.utils import InferenceServerException

from blipstream.contract import BLIP2, BLIP2_INPUTS, BLIP2_UNARY
from blipstream.triton.server import TritonServer

PATIENCE_S = 45.0
"""How long a test waits for something that must come about, within the minute that it has."""
LONG = 1000
"""Tokens of a stream that cannot come as one response: on a busy machine, those of a few milliseconds go together."""
PUBLICATION_S = 1.0
"""Longer than the time between two publications of the metrics."""

_DTYPES: dict[str, Any] = {
    "BYTES": np.object_,
    "FP16": np.float16,
    "FP32": np.float32,
    "INT32": np.int32,
    "UINT64": np.uint64,
    "BOOL": np.bool_,
}
_SPECS = {spec.name: spec for spec in BLIP2_INPUTS}


@dataclass(frozen=True)
class Reply:
    """One response."""

    text: str
    finish_reason: str
    num_input_tokens: int
    num_output_tokens: int
    token_ids: list[int]
    result: triton.InferResult

    @classmethod
    def read(cls, result: triton.InferResult) -> Reply:
        def scalar(name: str) -> Any:
            array = result.as_numpy(name)
            assert array.shape == (1, 1)
            return array[0, 0]

        return cls(
            scalar("text_output").decode(),
            scalar("finish_reason").decode(),
            int(scalar("num_input_tokens")),
            int(scalar("num_output_tokens")),
            result.as_numpy("output_ids")[0, 0].tolist(),
            result,
        )


def infer_input(name: str, value: Any) -> triton.InferInput:
    """An input with its batch dimension of 1; arrays are taken as they are."""
    dtype = _SPECS[name].dtype
    if not isinstance(value, np.ndarray):
        if isinstance(value, str):
            value = value.encode()
        value = np.array([value if isinstance(value, list) else [value]], _DTYPES[dtype])
    tensor = triton.InferInput(name, list(value.shape), dtype)
    tensor.set_data_from_numpy(value)
    return tensor


def infer_inputs(**inputs: Any) -> list[triton.InferInput]:
    return [infer_input(name, value) for name, value in inputs.items()]


class Stream:
    """One request on a connection of its own, whose responses come as they are."""

    def __init__(self, url: str, *, timeout_us: int | None = None, model: str = BLIP2, **inputs: Any) -> None:
        self._client = triton.InferenceServerClient(url)
        self._responses: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._client.start_stream(lambda result, error: self._responses.put((result, error)))
        self._client.async_stream_infer(
            model, infer_inputs(**inputs), request_id="test", timeout=timeout_us, enable_empty_final_response=True
        )
        self.is_final = False

    def next(self) -> Reply:
        """The next response, or its error as an exception."""
        result, error = self._responses.get(timeout=PATIENCE_S)
        if error is not None:
            self.is_final = True
            raise error
        response = result.get_response()
        self.is_final = response.parameters["triton_final_response"].bool_param
        return Reply.read(result)

    def rest(self) -> list[Reply]:
        """All responses that are still to come."""
        replies = []
        while not self.is_final:
            replies.append(self.next())
        return replies

    @property
    def silent(self) -> bool:
        """Whether no response lies ready."""
        return self._responses.empty()

    def cancel(self) -> None:
        self._client.stop_stream(cancel_requests=True)

    def close(self) -> None:
        self._client.stop_stream(cancel_requests=not self.is_final)
        self._client.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def generate(url: str, **inputs: Any) -> list[Reply]:
    """All responses of a request."""
    with Stream(url, **inputs) as stream:
        return stream.rest()


def ask(url: str, **inputs: Any) -> Reply:
    """The one response of a request that does not stream."""
    (reply,) = generate(url, **inputs)
    return reply


def ask_unary(url: str, *, timeout_us: int | None = None, **inputs: Any) -> Reply:
    """The response of ``blip2_unary``, by the unary call that every client knows."""
    with triton.InferenceServerClient(url) as client:
        return Reply.read(
            client.infer(BLIP2_UNARY, infer_inputs(**inputs), timeout=timeout_us, client_timeout=PATIENCE_S)
        )


def refusal(request: Callable[[], Any]) -> tuple[str, str]:
    """Status and message of the error that a request is answered with."""
    try:
        request()
    except InferenceServerException as error:
        return str(error.status()), str(error.message())
    raise AssertionError("the request was answered without an error")


def post(server: TritonServer, path: str, **fields: Any) -> tuple[int, bytes]:
    """Status and body of a POST of JSON."""
    body = json.dumps(fields).encode()
    request = urllib.request.Request(f"{server.http_url}/v2/models/{path}", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def events(body: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events."""
    for line in body.decode().splitlines():
        if line.startswith("data:"):
            yield json.loads(line.removeprefix("data:"))


def metrics(server: TritonServer) -> dict[str, float]:
    """Every sample of the metrics port, by its name with labels."""
    with urllib.request.urlopen(server.metrics_url, timeout=PATIENCE_S) as response:
        text = response.read().decode()
    samples = re.findall(r"^(\w+(?:\{[^}]*\})?) (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in samples}


def metric(server: TritonServer, name: str, **labels: str) -> float:
    """Sum of the samples of one name that have the given labels."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(
        value
        for sample, value in metrics(server).items()
        if sample.partition("{")[0] == name and all(label in sample for label in wanted)
    )


def settled(server: TritonServer, name: str, **labels: str) -> float:
    """A counter once it stands still: the server publishes what it counts some times a second."""
    values = [metric(server, name, **labels)]

    def stands_still() -> bool:
        time.sleep(PUBLICATION_S)
        values.append(metric(server, name, **labels))
        return values[-1] == values[-2]

    wait_until(stands_still)
    return values[-1]


def runs(server: TritonServer, model: str) -> int:
    """Inferences of a model since the server started, once the number stands still: Triton counts after it answers."""
    counts = [-1]

    def stands_still() -> bool:
        with triton.InferenceServerClient(server.grpc_url) as client:
            statistics = client.get_inference_statistics(model, client_timeout=PATIENCE_S)
        counts.append(int(statistics.model_stats[0].inference_stats.success.count))
        return counts[-1] == counts[-2]

    wait_until(stands_still)
    return counts[-1]


def wait_until(condition: Callable[[], Any]) -> None:
    """Wait for something that must come about."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


@contextmanager
def occupied(server: TritonServer, slots: int, image: bytes, **inputs: Any) -> Iterator[list[Stream]]:
    """Keep every slot busy with long sequences; cancels them at the end."""
    long = {"max_tokens": 100_000, "min_tokens": 100_000, "stream": True, **inputs}
    streams = [Stream(server.grpc_url, image=image, **long) for _ in range(slots)]
    try:
        for stream in streams:
            stream.next()
        yield streams
    finally:
        for stream in streams:
            stream.close()


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(file: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(file).decode()
