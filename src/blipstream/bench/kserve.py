"""The ``blip2`` model of a Triton server, over gRPC (KServe v2 with Triton's decoupled streams)."""

from __future__ import annotations

from collections.abc import Callable

from blipstream_client import Client

from blipstream.bench.load import Request
from blipstream.contract import BLIP2


class KServe:
    """See :class:`~blipstream.bench.load.Target`. Answers have exactly the tokens that are asked for.

    Args:
        url: ``HOST:PORT`` of gRPC.
        model: its name.
        timeout: seconds that an answer may take.
    """

    def __init__(self, url: str, model: str | None, timeout: float) -> None:
        self._client = Client(url, timeout=timeout, model=model or BLIP2)

    def send(self, request: Request, on_tokens: Callable[[int], None]) -> None:
        """See :meth:`~blipstream.bench.load.Target.send`."""
        tokens = request.output_tokens
        with self._client.stream(request.image, request.prompt, max_tokens=tokens, min_tokens=tokens) as chunks:
            for chunk in chunks:
                if chunk.token_ids:
                    on_tokens(len(chunk.token_ids))

    def close(self) -> None:
        """See :meth:`~blipstream.bench.load.Target.close`."""
        self._client.close()
