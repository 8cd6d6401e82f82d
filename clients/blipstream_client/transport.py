"""How the clients reach Triton: the channel's options, the method that is called, retries.

A request is one ``ModelStreamInfer`` call of its own, so any number of them share a connection, each with its own
deadline, and cancelling the call cancels that request alone. On the wire, a stream into which the client writes one
message is the same as a call with one request and many responses; the latter needs no thread to feed it.

A failed request is told by a message in its last response, not by a gRPC status. Triton would give one for the header
``triton_grpc_error: true``, but release 24.10 aborts after some of these, so the code is read from the message.
The call is read to its end even so: where one is cancelled just after its last response, that release may keep what it
held of the model, which is then not unloaded, and the server stops only when its time for that is up.

Retries are gRPC's own (gRFC A6): a call that fails as UNAVAILABLE before its first response (the server starts again,
a connection broke) is sent again, after a random wait that doubles each time. Nothing else is: a text is never
generated twice, and a server that is too busy says so at once.
"""

from __future__ import annotations

import json
from typing import Any

from blipstream.errors import InvalidRequestError

DEFAULT_URL = "localhost:8001"

METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
CONFIG_METHOD = "/inference.GRPCInferenceService/ModelConfig"

_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": "inference.GRPCInferenceService"}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}

CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    # a request that does not fit is sent without retries, and the default (256 KiB) is less than most photographs
    ("grpc.per_rpc_retry_buffer_size", 128 << 20),
    # after a failed connection gRPC would wait up to two minutes, and fail every call meanwhile
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 2000),
    ("grpc.max_reconnect_backoff_ms", 2000),
)


def check_url(url: str) -> str:
    """Return ``url`` if gRPC can make something of it: HOST:PORT, without a scheme or with one of gRPC's own.

    Raises:
        InvalidRequestError: it is empty, or an HTTP address.
    """
    if not url or url.startswith(("http://", "https://", "grpc://")):
        raise InvalidRequestError(f"the server's URL must be HOST:PORT of its gRPC endpoint, but it is {url!r}")
    return url
