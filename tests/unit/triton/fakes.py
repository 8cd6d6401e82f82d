"""Stand-ins for Triton: calls without a server, and the Python backend's module."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from blipstream.errors import BlipstreamError
from blipstream.manifest import (
    BUNDLE_REVISION,
    DecoderSection,
    GenerationSection,
    ImageSection,
    InstructionSection,
    Manifest,
    QFormerSection,
    VisionSection,
)
from blipstream.triton.calls import Answer
from tests.unit.decoding.fakes import EOS, VOCAB_SIZE

IMAGE_SIZE = 8


def make_manifest(*, instructed: bool = False, num_frames: int = 1, **decoder: int) -> Manifest:
    """A manifest for the byte tokenizer and the fake decoder; ``instructed``, with a Q-Former that reads texts."""
    sizes = {"max_sequences": 4, "max_tokens": 64, **decoder}
    return Manifest(
        revision=BUNDLE_REVISION,
        kind="blip2-opt",
        source="fake",
        engine="onnxruntime",
        precision={},
        image=ImageSection(
            size=IMAGE_SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resample="bicubic", rescale_factor=1 / 255
        ),
        vision=VisionSection(num_image_tokens=5, hidden_size=6, num_layers=1, num_frames=num_frames),
        qformer=QFormerSection(
            num_query_tokens=2,
            hidden_size=6,
            num_layers=1,
            instruction=InstructionSection(vocab_size=50, max_tokens=9, pad_token_id=7) if instructed else None,
        ),
        decoder=DecoderSection(
            family="opt",
            num_layers=1,
            num_key_value_heads=1,
            head_dim=4,
            hidden_size=4,
            vocab_size=VOCAB_SIZE,
            **sizes,
        ),
        generation=GenerationSection(
            empty_prompt_ids=(EOS,),
            eos_token_ids=(EOS,),
            pad_token_id=None,
            image_token_id=None,
            max_new_tokens=20,
        ),
        versions={},
        files={},
    )


def tensors(**inputs: Any) -> dict[str, np.ndarray]:
    """Inputs of ``blip2`` by name, with their batch dimension, as the Python backend hands them over."""
    floats = ("temperature", "top_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "length_penalty")
    result = {}
    for name, value in inputs.items():
        if name == "image_input":
            result[name] = value
        elif isinstance(value, list):
            result[name] = np.array([list(value)], np.object_)
        elif name in floats:
            result[name] = np.array([[value]], np.float32)
        elif isinstance(value, bool):
            result[name] = np.array([[value]], np.bool_)
        elif name == "random_seed":
            result[name] = np.array([[value]], np.uint64)
        elif isinstance(value, int):
            result[name] = np.array([[value]], np.int32)
        else:
            result[name] = np.array([[value]], np.object_)
    return result


class FakeCall:
    """A call whose client collects what it is answered."""

    def __init__(
        self, *, timeout: float = 0.0, name: str = "", parameters: Mapping[str, Any] | None = None, **inputs: Any
    ) -> None:
        self.request_id = "fake"
        self.arrived_at = time.monotonic()
        self.timeout = timeout
        self.name = name
        self.parameters = parameters or {}
        self.answers: list[Answer] = []
        self.error: BlipstreamError | None = None
        self.cancelled = False
        self.ended = threading.Event()
        self._inputs = tensors(**inputs)

    def inputs(self) -> Mapping[str, np.ndarray]:
        return self._inputs

    def is_cancelled(self) -> bool:
        assert not self.ended.is_set(), "asked about a call that has ended"
        return self.cancelled

    def send(self, answer: Answer, *, final: bool) -> None:
        assert not self.ended.is_set(), "answered after the final response"
        self.answers.append(answer)
        if final:
            self.ended.set()

    def fail(self, error: BlipstreamError) -> None:
        assert not self.ended.is_set(), "answered after the final response"
        self.error = error
        self.ended.set()

    def wait(self) -> FakeCall:
        assert self.ended.wait(60), "the call got no final response"
        return self

    @property
    def text(self) -> str:
        return "".join(answer.text for answer in self.answers)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token_id for answer in self.answers for token_id in answer.token_ids)

    @property
    def finish_reason(self) -> str:
        return self.answers[-1].finish_reason


class Tensor:
    """``pb_utils.Tensor``"""

    def __init__(self, name: str, array: np.ndarray) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class TritonError:
    """``pb_utils.TritonError``"""

    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class Response:
    """``pb_utils.InferenceResponse``"""

    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self._tensors, self._error = output_tensors or [], error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class Sender:
    """A response sender that keeps what it is given."""

    def __init__(self) -> None:
        self.sent: list[tuple[Response | None, int]] = []

    def send(self, response: Response | None = None, flags: int = 0) -> None:
        assert not (self.sent and self.sent[-1][1]), "sent after the final response"
        self.sent.append((response, flags))


class Request:
    """A request of the Python backend."""

    def __init__(
        self, inputs: Mapping[str, np.ndarray], *, timeout: int = 0, parameters: Mapping[str, Any] | None = None
    ) -> None:
        self._inputs, self._timeout, self._parameters = inputs, timeout, parameters or {}
        self.sender = Sender()
        self.questions = 0

    def inputs(self) -> list[Tensor]:
        return [Tensor(name, array) for name, array in self._inputs.items()]

    def request_id(self) -> str:
        return "request-7"

    def timeout(self) -> int:
        return self._timeout

    def parameters(self) -> str:
        return json.dumps(self._parameters)

    def get_response_sender(self) -> Sender:
        return self.sender

    def is_cancelled(self) -> bool:
        self.questions += 1
        return True


def backend_module() -> ModuleType:
    """A module like ``triton_python_backend_utils``, as far as the models use it."""
    module: Any = ModuleType("triton_python_backend_utils")
    module.Tensor, module.InferenceResponse, module.TritonError = Tensor, Response, TritonError
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    module.get_input_tensor_by_name = lambda request, name: next(t for t in request.inputs() if t.name() == name)
    module.get_output_tensor_by_name = lambda response, name: next(
        t for t in response.output_tensors() if t.name() == name
    )
    return module
