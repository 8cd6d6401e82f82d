"""How the clients reach Triton: the channel's options, the method that is called, retries.

A request is one ``ModelStreamInfer`` call of its own, so any number of them share a connection, each with its own
deadline, and cancelling the call cancels that request alone. On the wire, a stream into which the client writes one
message is the same as a call with one request and many responses; the latter needs no thread to feed it.

A failed request is told by a message in its last response, not by a gRPC status. Triton would give one for the header
``triton_grpc_error: true``, but release 24.10 aborts after some of these, so the code is read from the message.
The call is read to its end even so: where one is cancelled just after its last response, that release may keep what it
held of the model, which is then not unloaded, and the server stops only when its time for that is up.

A call that fails as UNAVAILABLE before its first response (the server starts again, a connection broke) is sent again,
after a random wait that grows each time. Nothing else is: a text is never generated twice, and a server that is too
busy says so at once. The retries are not gRPC's own (gRFC A6), which grpcio 1.85 does not survive: when the server ends
the connection (GOAWAY) just as a call begins, that call now and then gets neither a response nor a status, not even at
its deadline (grpc/grpc 39935, 41036: the timer of a retry can leave the call locked).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Any

import grpc
import tenacity

from blipstream.errors import InvalidRequestError

DEFAULT_URL = "localhost:8001"

METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
CONFIG_METHOD = "/inference.GRPCInferenceService/ModelConfig"
READY_METHOD = "/inference.GRPCInferenceService/ModelReady"

DEFAULT_TIMEOUT_S = 300.0
"""Seconds that a request may take where the caller does not say."""


def is_unavailable(error: BaseException) -> bool:
    """Whether a call failed because the server could not be reached."""
    return isinstance(error, grpc.RpcError) and error.code() is grpc.StatusCode.UNAVAILABLE


RETRYING: Mapping[str, Any] = {
    "stop": tenacity.stop_after_attempt(4),
    "wait": tenacity.wait_exponential(multiplier=0.1, max=2.0) + tenacity.wait_random(0, 0.1),
    "retry": tenacity.retry_if_exception(is_unavailable),
    "reraise": True,
}
"""How tenacity sends a call again."""

_SCHEMES = ("ipv4:", "ipv6:", "unix:", "unix-abstract:", "vsock:", "xds:")
_HOST_PORT = re.compile(r"(?P<host>\[[^\s\[\]]+\]|[^\s:/\[\]]+)(:(?P<port>\d+))?", re.ASCII)

_CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_retries", 0),
    # a peer that is gone is noticed; pings more often than every five minutes would make Triton close the connection
    ("grpc.keepalive_time_ms", 310_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # after a failed connection gRPC would wait up to two minutes, and fail every call meanwhile
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 2000),
    ("grpc.max_reconnect_backoff_ms", 2000),
)


def channel_options(url: str) -> tuple[tuple[str, Any], ...]:
    """The options of a channel to ``url``; what is on this machine is never asked through an HTTP proxy."""
    return (*_CHANNEL_OPTIONS, ("grpc.enable_http_proxy", int(not is_loopback(url))))


def is_loopback(url: str) -> bool:
    """Whether ``url`` names this machine."""
    found = _HOST_PORT.fullmatch(_address(url))
    host = found["host"].strip("[]") if found else ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_url(url: str) -> str:
    """Return ``url`` if gRPC can make something of it: HOST:PORT, without a scheme or with one of gRPC's own.

    Raises:
        InvalidRequestError: it is none, or an HTTP address.
    """
    if isinstance(url, str) and url.startswith(_SCHEMES):
        return url
    found = _HOST_PORT.fullmatch(_address(url)) if isinstance(url, str) else None
    if not found:
        reason = ""
    elif found["port"] is None:
        reason = ", which has no port"
    elif not 0 < int(found["port"]) < 65536:
        reason = ", whose port is not from 1 to 65535"
    else:
        return url
    raise InvalidRequestError(f"the server's URL must be HOST:PORT of its gRPC endpoint, but it is {url!r}{reason}")


def _address(url: str) -> str:
    """The URL without gRPC's scheme for names and addresses."""
    return re.sub(r"^(dns:(///)?|ipv4:|ipv6:)", "", url)
