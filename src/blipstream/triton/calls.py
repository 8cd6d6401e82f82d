"""A request as Triton hands it over, and the way back: the only place that knows the Python backend's objects.

The module of the Python backend exists only inside a process that ``tritonserver`` started; it is imported where it is
used, so that tests and tools can import everything else.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from blipstream.contract import ERROR_CODES
from blipstream.errors import (
    BlipstreamError,
    EngineError,
    InvalidRequestError,
    RequestTimeoutError,
    ServerBusyError,
)
from blipstream.triton.parameters import CALL_PARAMETER, timeout_seconds

Array = npt.NDArray[Any]

_CODED = re.compile(rf"\b({'|'.join(ERROR_CODES)}): ")
_ERRORS = dict(zip(ERROR_CODES, (InvalidRequestError, ServerBusyError, EngineError), strict=True))


@dataclass(frozen=True)
class Answer:
    """One response of ``blip2``: the text since the last one, and the counts so far."""

    text: str
    finish_reason: str
    """Empty while more follows."""
    num_input_tokens: int
    num_output_tokens: int
    token_ids: tuple[int, ...] = ()
    """Tokens since the last response."""
    log_probs: tuple[float, ...] | None = None
    """Of the tokens since the last response, when the request asks for them."""
    cum_log_prob: float = 0.0
    """Sum over all tokens so far."""

    def tensors(self) -> dict[str, Array]:
        """The outputs by name, with their batch dimension of 1."""
        outputs: dict[str, Array] = {
            "text_output": np.array([[self.text.encode()]], np.object_),
            "finish_reason": np.array([[self.finish_reason.encode()]], np.object_),
            "num_input_tokens": np.array([[self.num_input_tokens]], np.int32),
            "num_output_tokens": np.array([[self.num_output_tokens]], np.int32),
            "output_ids": np.array([[self.token_ids]], np.int32),
            "sequence_index": np.zeros((1, 1), np.int32),
        }
        if self.log_probs is not None:
            outputs["cum_log_probs"] = np.array([[self.cum_log_prob]], np.float32)
            outputs["output_log_probs"] = np.array([[self.log_probs]], np.float32)
        return outputs


class Call(Protocol):
    """A request and its response sender, as the service sees them. Every call gets exactly one final response."""

    request_id: str
    arrived_at: float
    """Time (``time.monotonic()``, seconds)."""
    timeout: float
    """Seconds that the client is ready to wait for a slot; 0 when it did not say."""
    parameters: Mapping[str, Any]
    """What came beside the inputs."""

    @property
    def name(self) -> str:
        """Name by which it may be cancelled; empty when there is none."""
        ...

    def inputs(self) -> Mapping[str, Array]:
        """The inputs by name, with their batch dimension."""
        ...

    def is_cancelled(self) -> bool:
        """Ask Triton whether the client has cancelled; takes a fraction of a millisecond."""
        ...

    def send(self, answer: Answer, *, final: bool) -> None:
        """Send a response; blocks until Triton has taken it, a fraction of a millisecond."""
        ...

    def fail(self, error: BlipstreamError) -> None:
        """Send an error as the final response."""
        ...


class TritonCall:
    """A :class:`Call` over a request of the Python backend.

    Triton frees a request's state with its final response. A question about it after that would read freed memory in
    the server's own process; so questions and the final response take turns, and none is asked afterwards. Nor is the
    request kept: while one is held, by a traceback's frames for instance, Triton does not unload its model.
    """

    def __init__(self, request: Any) -> None:
        self._request = request
        self._sender = request.get_response_sender()
        self._lock = threading.Lock()
        self._over = False  # guarded by the lock
        self.request_id = str(request.request_id())
        self.arrived_at = time.monotonic()
        self.parameters: Mapping[str, Any] = _parameters(request)
        self.timeout = timeout_seconds(request.timeout(), self.parameters)

    @property
    def name(self) -> str:
        """Name by which it may be cancelled; empty when there is none."""
        return str(self.parameters.get(CALL_PARAMETER, ""))

    def inputs(self) -> dict[str, Array]:
        """The inputs by name, with their batch dimension; none, once the final response was sent."""
        with self._lock:
            tensors = [] if self._over else self._request.inputs()
            return {tensor.name(): tensor.as_numpy() for tensor in tensors}

    def is_cancelled(self) -> bool:
        """Ask Triton whether the client has cancelled; no, once the final response was sent."""
        with self._lock:
            return not self._over and bool(self._request.is_cancelled())

    def send(self, answer: Answer, *, final: bool) -> None:
        """Send a response."""
        import triton_python_backend_utils as pb_utils

        tensors = [pb_utils.Tensor(name, array) for name, array in answer.tensors().items()]
        self.respond(pb_utils.InferenceResponse(output_tensors=tensors), final=final)

    def fail(self, error: BlipstreamError) -> None:
        """Send an error as the final response; its message begins with one of ``ERROR_CODES``."""
        import triton_python_backend_utils as pb_utils

        self.respond(pb_utils.InferenceResponse(output_tensors=[], error=triton_error(error)), final=True)

    def respond(self, response: Any, *, final: bool) -> None:
        """Send a response of the Python backend; None ends the call without one."""
        import triton_python_backend_utils as pb_utils

        if not final:
            self._sender.send(response)
            return
        with self._lock:
            self._over = True
            arguments = () if response is None else (response,)
            self._sender.send(*arguments, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            self._request = self._sender = None


def code_of(error: BaseException) -> str:
    """The one of :data:`~blipstream.contract.ERROR_CODES` for an exception."""
    if isinstance(error, InvalidRequestError):
        return "INVALID_ARGUMENT"
    if isinstance(error, (ServerBusyError, RequestTimeoutError)):
        return "UNAVAILABLE"
    return "INTERNAL"


def message_of(error: BaseException) -> str:
    """What a client may read of an exception."""
    return str(error) if isinstance(error, BlipstreamError) else f"an internal error occurred: {error!r}"


def triton_error(error: BaseException) -> Any:
    """The error of the Python backend for an exception; its message begins with one of ``ERROR_CODES``.

    This version of Triton tells a BLS call the message of an error without its code.
    """
    import triton_python_backend_utils as pb_utils

    code = code_of(error)
    return pb_utils.TritonError(f"{code}: {message_of(error)}", _triton_codes()[code])


def forwarded_error(error: Any) -> Any:
    """An error of ``blip2``, as a BLS call is told it, with the code that its message begins with."""
    import triton_python_backend_utils as pb_utils

    message = str(error.message())
    return pb_utils.TritonError(message, _triton_codes().get(message.partition(": ")[0], error.code()))


def _triton_codes() -> dict[str, Any]:
    """The Python backend's codes, by :data:`~blipstream.contract.ERROR_CODES`."""
    import triton_python_backend_utils as pb_utils

    error = pb_utils.TritonError
    return dict(zip(ERROR_CODES, (error.INVALID_ARG, error.UNAVAILABLE, error.INTERNAL), strict=True))


def error_of(message: str) -> BlipstreamError:
    """The exception for a model's error; an ensemble puts words of its own before the message of a step."""
    found = _CODED.search(message)
    return EngineError(message) if found is None else _ERRORS[found[1]](message[found.end() :])


def run_model(model: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
    """Run another model of the server (BLS) and return the outputs by name; blocks until it has answered.

    Raises:
        BlipstreamError: the one that the model answered with, of the kind that its code tells.
    """
    import triton_python_backend_utils as pb_utils

    tensors = [pb_utils.Tensor(name, array) for name, array in inputs.items()]
    request = pb_utils.InferenceRequest(model_name=model, requested_output_names=list(outputs), inputs=tensors)
    response = request.exec()
    if response.has_error():
        raise error_of(str(response.error().message()))
    return {name: pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in outputs}


def _parameters(request: Any) -> dict[str, Any]:
    parameters = json.loads(request.parameters() or "{}")
    return parameters if isinstance(parameters, dict) else {}
