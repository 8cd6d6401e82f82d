"""A chat completions endpoint in this process, whose model's name says what it does."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Handler(BaseHTTPRequestHandler):
    """Streams as many words as tokens are asked for; ``/metrics`` is that of a Blipstream server."""

    server: Endpoint

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        if self.path == "/metrics" and not self.server.dead:
            count = len(self.server.bodies)
            self.wfile.write(f"# TYPE blipstream_requests_total counter\nblipstream_requests_total {count}\n".encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append({"path": self.path, **body})
        model = body["model"]
        self.server.dead = model == "mortal" and len(self.server.bodies) > 6
        if model == "interrupting" and len(self.server.bodies) > 6:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        if self.server.dead:
            return
        if model == "unknown":
            self.send_error(404, "no such model")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for _ in range(1 if model == "short" else body["max_tokens"]):
            self.event({"choices": [{"delta": {"content": " word"}}]})
        if model == "failing":
            self.event({"error": {"message": "out of memory"}})
        elif model == "garbled":
            self.wfile.write(b"data: {not json\n\n")
        else:
            self.event({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
            self.wfile.write(b"data: [DONE]\n\n")

    def event(self, content: dict) -> None:
        self.wfile.write(b": a comment\n" + b"data: " + json.dumps(content).encode() + b"\n\n")

    def log_message(self, *arguments: object) -> None:
        pass


class Endpoint(ThreadingHTTPServer):
    """Keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict] = []
        self.dead = False
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()
