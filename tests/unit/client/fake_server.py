"""A gRPC server that behaves as ``blip2`` does, as far as a client can tell. What it does, the prompt says."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

PATIENCE_S = 60.0
WORDS = (" a", " red", " circle")
INPUT_TOKENS = 17

Stream = Iterator[pb.ModelStreamInferResponse]


class FakeServer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Serves on a free port of the loopback address until it is closed.

    Prompts: ``fail MESSAGE`` answers with that error; ``slow`` sends one chunk and then nothing until the client gives
    up; ``meet N`` waits for N such requests; ``cut`` ends without a last chunk; ``break CODE`` ends with a gRPC status
    after one chunk; ``bare`` leaves outputs out; ``reason R`` ends for that reason; anything else is answered.
    """

    def __init__(self, port: int = 0, *, echo_bytes: int = 0) -> None:
        self.requests: list[pb.ModelInferRequest] = []
        self.metadata: list[dict[str, Any]] = []
        self.peers: set[str] = set()
        self.cancelled = threading.Semaphore(0)
        """Released once for each request that the client gave up."""
        self.unavailable = 0
        """Calls that are turned away before anything is said."""
        self.template: str | grpc.StatusCode | None = None
        """Of questions, in the model's configuration; a status fails the call for it."""
        self.configs: list[str] = []
        """Models whose configuration was asked for."""
        self._text = "x" * echo_bytes
        self._met = threading.Condition()
        self._meeting = 0
        self._server = grpc.server(
            ThreadPoolExecutor(64), options=[("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)]
        )
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.url = f"127.0.0.1:{self.port}"
        self._server.start()

    def close(self) -> None:
        self._server.stop(0).wait()

    def ModelConfig(self, request: pb.ModelConfigRequest, context: grpc.ServicerContext) -> pb.ModelConfigResponse:  # noqa: N802
        self.configs.append(request.name)
        if isinstance(self.template, grpc.StatusCode):
            context.abort(self.template, "no configuration")
        response = pb.ModelConfigResponse()
        if self.template is not None:
            response.config.parameters["question_template"].string_value = self.template
        return response

    def ModelReady(self, request: pb.ModelReadyRequest, context: Any) -> pb.ModelReadyResponse:  # noqa: N802
        return pb.ModelReadyResponse(ready=request.name == "blip2")

    def inputs(self, index: int = -1) -> dict[str, tuple[str, list[int], list[Any]]]:
        """Type, shape and values of each input of a request."""
        return {
            tensor.name: (tensor.datatype, list(tensor.shape), _values(tensor))
            for tensor in self.requests[index].inputs
        }

    def ModelStreamInfer(self, requests: Iterator[pb.ModelInferRequest], context: grpc.ServicerContext) -> Stream:  # noqa: N802
        self.metadata.append(dict(context.invocation_metadata()))
        self.peers.add(context.peer())
        if self.unavailable > 0:
            self.unavailable -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
        for request in requests:
            self.requests.append(request)
            yield from self._answer(self.inputs(), context)

    def _answer(self, inputs: dict[str, Any], context: grpc.ServicerContext) -> Stream:
        command, _, argument = inputs["text_input"][2][0].decode().partition(" ")
        if command == "fail":
            yield pb.ModelStreamInferResponse(error_message=argument)
        elif command in ("slow", "silent"):
            gone = self._watch(context)  # first, because grpcio does not go on with a call that is cancelled
            if command == "slow":
                yield response(" a", num_output_tokens=1)
            assert gone.wait(PATIENCE_S)
        elif command == "cut":
            yield response(" a", num_output_tokens=1)
        elif command == "break":
            yield response(" a", num_output_tokens=1)
            context.abort(getattr(grpc.StatusCode, argument), "it broke")
        elif command == "bare":
            yield pb.ModelStreamInferResponse(infer_response=pb.ModelInferResponse())
        elif command == "reason":
            yield response("", argument)
        else:
            if command == "meet":
                self._meet(int(argument))
            yield from self._words(inputs)

    def _words(self, inputs: dict[str, Any]) -> Stream:
        stream = bool(inputs["stream"][2][0])
        words = (self._text,) if self._text else WORDS
        log_probs = bool(inputs.get("return_log_probs", (0, 0, [False]))[2][0])
        pieces = [*words, ""] if stream else ["".join(words)]
        for i, piece in enumerate(pieces):
            last = i == len(pieces) - 1
            tokens = list(range(10, 11 + len(words)))
            yield response(
                piece,
                "eos" if last else "",
                num_output_tokens=len(tokens) if last else i + 1,
                tokens=[tokens[i]] if stream else tokens,
                log_probs=([-0.5] if stream else [-0.5] * len(tokens)) if log_probs else None,
            )

    def _watch(self, context: grpc.ServicerContext) -> threading.Event:
        gone = threading.Event()

        def on_end() -> None:
            gone.set()
            self.cancelled.release()

        if not context.add_callback(on_end):
            on_end()
        return gone

    def _meet(self, count: int) -> None:
        with self._met:
            self._meeting += 1
            self._met.notify_all()
            assert self._met.wait_for(lambda: self._meeting >= count, PATIENCE_S)


def response(
    text: str,
    finish_reason: str = "",
    *,
    num_output_tokens: int = 0,
    tokens: list[int] | None = None,
    log_probs: list[float] | None = None,
) -> pb.ModelStreamInferResponse:
    """One response, encoded as Triton encodes it."""
    message = pb.ModelInferResponse(model_name="blip2", model_version="1")

    def add(name: str, datatype: str, shape: list[int], raw: bytes) -> None:
        message.outputs.add(name=name, datatype=datatype, shape=shape)
        message.raw_output_contents.append(raw)

    add("text_output", "BYTES", [1, 1], _bytes(text))
    add("finish_reason", "BYTES", [1, 1], _bytes(finish_reason))
    add("num_input_tokens", "INT32", [1, 1], struct.pack("<i", INPUT_TOKENS))
    add("num_output_tokens", "INT32", [1, 1], struct.pack("<i", num_output_tokens))
    ids = tokens or []
    add("output_ids", "INT32", [1, 1, len(ids)], np.array(ids, "<i4").tobytes())
    if log_probs is not None:
        add("output_log_probs", "FP32", [1, 1, len(log_probs)], np.array(log_probs, "<f4").tobytes())
    return pb.ModelStreamInferResponse(infer_response=message)


def _bytes(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<I", len(data)) + data


def _values(tensor: Any) -> list[Any]:
    contents = tensor.contents
    fields = (
        contents.bytes_contents,
        contents.int_contents,
        contents.uint64_contents,
        contents.fp32_contents,
        contents.bool_contents,
    )
    return [value for field in fields for value in field]


def wait_until(condition: Any) -> None:
    """Wait for something that must come about."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)
