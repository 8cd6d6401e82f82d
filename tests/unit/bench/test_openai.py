"""The chat completions target, against a real HTTP server that answers as such endpoints do."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from blipstream.bench.load import Request
from blipstream.bench.openai import OpenAI
from blipstream.errors import ClientError, InvalidRequestError

ASKED = Request(b"a file", "what is this", 4)


class Handler(BaseHTTPRequestHandler):
    """Streams as many words as tokens are asked for; the model's name says what goes wrong."""

    bodies: ClassVar[list[dict]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append({"path": self.path, **body})
        if body["model"] == "unknown":
            self.send_error(404, "no such model")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for _ in range(body["max_tokens"]):
            self.event({"choices": [{"delta": {"content": " word"}}]})
        if body["model"] == "failing":
            self.event({"error": {"message": "out of memory"}})
        elif body["model"] == "garbled":
            self.wfile.write(b"data: {not json\n\n")
        else:
            self.event({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
            self.wfile.write(b"data: [DONE]\n\n")

    def event(self, content: dict) -> None:
        self.wfile.write(b": a comment\n" + b"data: " + json.dumps(content).encode() + b"\n\n")

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    Handler.bodies = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_every_piece_of_text_is_a_token(url: str) -> None:
    tokens: list[int] = []
    OpenAI(f"{url}/prefix/", "blip2", timeout=10).send(ASKED, tokens.append)
    assert tokens == [1] * 4
    body = Handler.bodies[-1]
    assert body["path"] == "/prefix/v1/chat/completions"
    assert (body["max_tokens"], body["min_tokens"], body["stream"], body["model"]) == (4, 4, True, "blip2")
    picture, text = body["messages"][0]["content"]
    assert base64.b64decode(picture["image_url"]["url"].partition(",")[2]) == b"a file"
    assert text["text"] == "what is this"


@pytest.mark.parametrize(
    ("model", "fault"), [("unknown", "404"), ("failing", "out of memory"), ("garbled", "cannot be asked")]
)
def test_what_goes_wrong_is_an_error_of_the_request(url: str, model: str, fault: str) -> None:
    with pytest.raises(ClientError, match=fault):
        OpenAI(url, model, timeout=10).send(ASKED, lambda _: None)


def test_a_server_that_is_not_there_and_arguments_that_are_none() -> None:
    with pytest.raises(ClientError, match="cannot be asked"):
        OpenAI("http://127.0.0.1:1", "blip2", timeout=10).send(ASKED, lambda _: None)
    with pytest.raises(InvalidRequestError, match="http://HOST:PORT"):
        OpenAI("localhost:8000", "blip2", timeout=10)
    with pytest.raises(InvalidRequestError, match="give --model"):
        OpenAI("http://localhost:8000", None, timeout=10)
