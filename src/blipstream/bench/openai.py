"""A chat completions endpoint as OpenAI has it and vLLM serves it, over HTTP with server-sent events.

Source: OpenAI's API reference on chat completions. ``min_tokens`` and ``ignore_eos`` are vLLM's own; a server that does
not know them answers as long as it likes.
"""

from __future__ import annotations

import base64
import http.client
import json
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

from blipstream.bench.load import Request
from blipstream.errors import ClientError, InvalidRequestError

_CAPTION = "Describe the image."
"""What is asked where a request has no prompt: a chat must have one."""
_PATH = "/v1/chat/completions"


class OpenAI:
    """See :class:`~blipstream.bench.load.Target`. Each event with text counts as one token.

    Args:
        url: ``http://HOST:PORT``, or ``https``; a path in it comes before ``/v1``.
        model: its name.
        timeout: seconds between two pieces of an answer.

    Raises:
        InvalidRequestError: it is no such URL, or no model is named.
    """

    def __init__(self, url: str, model: str | None, timeout: float) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError:
            self._host = ""
        if not self._host or parts.scheme not in ("http", "https"):
            raise InvalidRequestError(f"an OpenAI endpoint must be http://HOST:PORT or https://HOST, but it is {url!r}")
        if not model:
            raise InvalidRequestError("an OpenAI endpoint serves models by name: give --model")
        self._connection = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._path = parts.path.rstrip("/") + _PATH
        self._url, self._model = url, model
        self._timeout = timeout

    def send(self, request: Request, on_tokens: Callable[[int], None]) -> None:
        """See :meth:`~blipstream.bench.load.Target.send`."""
        connection = self._connection(self._host, self._port, timeout=self._timeout)
        try:
            connection.request("POST", self._path, json.dumps(self._body(request)), _HEADERS)
            response = connection.getresponse()
            if response.status != http.HTTPStatus.OK:
                text = response.read(500).decode(errors="replace").strip()
                raise ClientError(f"{self._url} answered {response.status}: {text}")
            for event in _events(response):
                if "error" in event:
                    raise ClientError(f"{self._url} failed: {event['error']}")
                if any(choice.get("delta", {}).get("content") for choice in event.get("choices", ())):
                    on_tokens(1)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ClientError(
                f"{self._url} cannot be asked: {getattr(error, 'strerror', None) or repr(error)}"
            ) from error
        finally:
            connection.close()

    def close(self) -> None:
        """Nothing stays open between requests."""

    def _body(self, request: Request) -> dict[str, Any]:
        picture = "data:image/jpeg;base64," + base64.b64encode(request.image).decode()
        content = [
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "text", "text": request.prompt or _CAPTION},
        ]
        return {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": request.output_tokens,
            "min_tokens": request.output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }


_HEADERS = {"Content-Type": "application/json", "Accept": "text/event-stream"}


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON objects of the stream, up to its end mark."""
    for raw in response:
        line = raw.decode().strip()
        if line == "data: [DONE]":
            return
        if line.startswith("data:"):
            yield json.loads(line.removeprefix("data:"))
