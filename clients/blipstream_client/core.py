"""What both clients share: requests encoded, responses decoded, failures turned into errors. Sends nothing itself."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast, get_args

import grpc
from tritonclient.grpc import InferResult, service_pb2

from blipstream.contract import (
    BLIP2_INPUTS,
    ERROR_CODES,
    QUESTION_TEMPLATE,
    QUESTION_TEMPLATE_PARAMETER,
    TensorSpec,
)
from blipstream.errors import (
    ClientError,
    DeadlineExceededError,
    InvalidRequestError,
    RequestRefusedError,
    ServerUnavailableError,
)
from blipstream_client import transport
from blipstream_client.answers import FinishReason, TextChunk
from blipstream_client.options import check_names

_INPUTS: Mapping[str, TensorSpec] = {spec.name: spec for spec in BLIP2_INPUTS}
_TENSOR_NAMES = {"seed": "random_seed", "stop": "stop_words", "log_probs": "return_log_probs"}
"""Input tensor of each option whose name differs."""

_CONTENTS = {
    "BYTES": "bytes_contents",
    "INT32": "int_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "BOOL": "bool_contents",
}
"""Field of ``InferTensorContents`` for each type of tensor."""

# --- requests --------------------------------------------------------------------------------------------------------


def encode_request(
    model: str, images: Sequence[bytes], prompt: str, options: Mapping[str, object], *, stream: bool
) -> service_pb2.ModelInferRequest:
    """Make the request for one text; scalars have shape (1, 1), images and lists of strings (1, n).

    Raises:
        TypeError: an option that does not exist.
        InvalidRequestError: a prompt or an option of a wrong type, or outside what its tensor can hold.
    """
    check_names(options)
    request = service_pb2.ModelInferRequest(model_name=model)
    _add_tensor(request, _INPUTS["image"], images)
    _add_tensor(request, _INPUTS["text_input"], _utf8("prompt", [prompt]))
    _add_tensor(request, _INPUTS["stream"], [stream])
    for option, value in options.items():
        if value is None:
            continue
        spec = _INPUTS[_TENSOR_NAMES.get(option, option)]
        values = _VALUES[spec.dtype](option, value)
        if values:
            _add_tensor(request, spec, values)
    return request


def check_timeout(timeout: float) -> float:
    """Return the timeout, in seconds.

    Raises:
        InvalidRequestError: it is not a positive, finite number.
    """
    (seconds,) = _floats("timeout", timeout)
    if not 0 < seconds < math.inf:
        raise InvalidRequestError(f"timeout must be a finite number of seconds above 0, but it is {seconds}")
    return seconds


def _add_tensor(request: service_pb2.ModelInferRequest, spec: TensorSpec, values: Sequence[Any]) -> None:
    tensor = request.inputs.add(name=spec.name, datatype=spec.dtype, shape=[1, len(values)])
    getattr(tensor.contents, _CONTENTS[spec.dtype]).extend(values)


def _integers(option: str, value: object, *, low: int, high: int) -> list[int]:
    # NumPy's integers count as well; a bool is an integer to Python alone
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InvalidRequestError(f"{option} must be an integer, but it is {value!r}")
    number = int(value.__index__())
    if not low <= number <= high:
        raise InvalidRequestError(f"{option} must be an integer from {low} to {high}, but it is {number}")
    return [number]


def _floats(option: str, value: object) -> list[float]:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise InvalidRequestError(f"{option} must be a number, but it is {value!r}")
    return [float(value.__float__())]


def _bools(option: str, value: object) -> list[bool]:
    if not isinstance(value, bool):
        raise InvalidRequestError(f"{option} must be true or false, but it is {value!r}")
    return [value]


def _strings(option: str, value: object) -> list[bytes]:
    if isinstance(value, str):
        return _utf8(option, [value])
    if isinstance(value, bytes) or not isinstance(value, Sequence):
        raise InvalidRequestError(f"{option} must be a string or a list of strings, but it is {value!r}")
    return _utf8(option, value)


def _utf8(name: str, texts: Sequence[object]) -> list[bytes]:
    encoded = []
    for text in texts:
        if not isinstance(text, str):
            raise InvalidRequestError(f"{name} must be text, but it is {text!r}")
        try:
            encoded.append(text.encode("utf-8"))
        except UnicodeEncodeError:
            raise InvalidRequestError(f"{name} must be text that UTF-8 can encode, but it is {text!r}") from None
    return encoded


_VALUES: Mapping[str, Callable[[str, object], Sequence[Any]]] = {
    "BYTES": _strings,
    "INT32": partial(_integers, low=-(2**31), high=2**31 - 1),
    "UINT64": partial(_integers, low=0, high=2**64 - 1),
    "FP32": _floats,
    "BOOL": _bools,
}

# --- responses -------------------------------------------------------------------------------------------------------


def decode_response(response: service_pb2.ModelStreamInferResponse, url: str) -> TextChunk:
    """Read one response of the stream.

    Raises:
        ClientError: the response carries an error, or lacks a tensor.
    """
    if response.error_message:
        code, separator, message = response.error_message.partition(": ")
        if separator and code in ERROR_CODES:
            raise _failure(code, message, url)
        raise _failure("UNKNOWN", response.error_message, url)
    result = InferResult(response.infer_response)
    reason = _first(result, "finish_reason", url).decode("utf-8")
    if reason and reason not in get_args(FinishReason):
        raise ClientError(
            f"the server at {url} ended the text for the reason {reason!r}, which this client does not know: "
            f"it knows {', '.join(get_args(FinishReason))}"
        )
    return TextChunk(
        text=_first(result, "text_output", url).decode("utf-8"),
        finish_reason=cast(FinishReason, reason) if reason else None,
        num_input_tokens=int(_first(result, "num_input_tokens", url)),
        num_output_tokens=int(_first(result, "num_output_tokens", url)),
        token_ids=_all(result, "output_ids"),
        log_probs=_all(result, "output_log_probs"),
    )


def _first(result: InferResult, name: str, url: str) -> Any:
    values = result.as_numpy(name)
    if values is None or values.size == 0:
        raise ClientError(f"the answer of the server at {url} lacks {name}: is the model served there Blipstream's?")
    return values.flat[0]


def _all(result: InferResult, name: str) -> tuple[Any, ...]:
    """The values of an output that not every answer holds."""
    values = result.as_numpy(name)
    return () if values is None else tuple(values.ravel().tolist())


def incomplete(url: str) -> ClientError:
    """The error of a stream that ended without a last chunk."""
    return ClientError(f"the server at {url} ended the stream before the text was complete")


# --- how the checkpoint was shown questions --------------------------------------------------------------------------


def config_request(model: str) -> service_pb2.ModelConfigRequest:
    """The request for a model's configuration."""
    return service_pb2.ModelConfigRequest(name=model)


def decode_template(response: service_pb2.ModelConfigResponse) -> str:
    """The template of questions in a model's configuration; BLIP-2's where it has none."""
    return response.config.parameters[QUESTION_TEMPLATE_PARAMETER].string_value or QUESTION_TEMPLATE


def default_template(error: grpc.RpcError, url: str, timeout: float) -> str:
    """BLIP-2's template, for a server that gives no configurations away.

    Raises:
        ClientError: the server is out of reach, or did not answer in time.
    """
    if error.code().name in _NO_CONFIGURATION or "restricted" in (error.details() or ""):
        return QUESTION_TEMPLATE
    raise client_error(error, url, timeout) from error


_NO_CONFIGURATION = ("UNIMPLEMENTED", "PERMISSION_DENIED", "UNAUTHENTICATED")

# --- failures --------------------------------------------------------------------------------------------------------


_CAUSES = (
    ("Connection refused", "nothing listens there; `blipstream serve BUNDLE` starts a server"),
    ("SETTINGS", "what listens there does not speak gRPC; the port for gRPC is 8001 by default, that for HTTP 8000"),
    ("Socket closed", "the connection was closed: the server ended, or the port is not its port for gRPC"),
)
"""What gRPC says of a failed connection, and what it means."""


def client_error(error: grpc.RpcError, url: str, timeout: float) -> ClientError:
    """The error for a call that failed, by its gRPC status; the calls of both of grpcio's APIs say it alike."""
    code = error.code().name
    if code == "DEADLINE_EXCEEDED":
        return DeadlineExceededError(f"the server at {url} did not complete the answer within {timeout:g} s")
    details = error.details() or "no details were given"
    if code == "UNAVAILABLE":
        details = next((cause for sign, cause in _CAUSES if sign in details), details) + _proxy_hint(url)
    return _failure(code, details, url)


def _proxy_hint(url: str) -> str:
    """Says so where gRPC may have asked a proxy in place of the server."""
    names = () if transport.is_loopback(url) else ("grpc_proxy", "https_proxy", "http_proxy")
    name = next((name for name in names if os.environ.get(name)), None)
    return f" ({name} names a proxy; no_proxy lists the hosts to reach without it)" if name else ""


def _failure(code: str, message: str, url: str) -> ClientError:
    if code == "INVALID_ARGUMENT":
        return RequestRefusedError(message)
    if code == "UNAVAILABLE":
        return ServerUnavailableError(f"the server at {url} is unavailable: {message}")
    if code == "CANCELLED":
        return ClientError(f"the request to {url} was cancelled: {message}")
    return ClientError(f"the server at {url} failed the request ({code}): {message}")


def closed(url: str) -> ClientError:
    """The error of a request to a client that was closed."""
    return ClientError(f"the client of {url} is closed")
