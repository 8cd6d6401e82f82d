"""The chat completions target, against a real HTTP server that answers as such endpoints do."""

from __future__ import annotations

import base64

import pytest

from blipstream.bench.load import Request
from blipstream.bench.openai import OpenAI
from blipstream.errors import ClientError, InvalidRequestError
from tests.unit.bench.conftest import Endpoint

ASKED = Request(b"a file", "what is this", 4)


def test_every_piece_of_text_is_a_token(endpoint: Endpoint) -> None:
    tokens: list[int] = []
    OpenAI(f"{endpoint.url}/prefix/", "blip2", timeout=10).send(ASKED, tokens.append)
    assert tokens == [1] * 4
    body = endpoint.bodies[-1]
    assert body["path"] == "/prefix/v1/chat/completions"
    assert (body["max_tokens"], body["min_tokens"], body["stream"], body["model"]) == (4, 4, True, "blip2")
    picture, text = body["messages"][0]["content"]
    assert base64.b64decode(picture["image_url"]["url"].partition(",")[2]) == b"a file"
    assert text["text"] == "what is this"


@pytest.mark.parametrize(
    ("model", "fault"), [("unknown", "404"), ("failing", "out of memory"), ("garbled", "cannot be asked")]
)
def test_what_goes_wrong_is_an_error_of_the_request(endpoint: Endpoint, model: str, fault: str) -> None:
    with pytest.raises(ClientError, match=fault):
        OpenAI(endpoint.url, model, timeout=10).send(ASKED, lambda _: None)


def test_a_server_that_is_not_there_and_arguments_that_are_none() -> None:
    with pytest.raises(ClientError, match="cannot be asked"):
        OpenAI("http://127.0.0.1:1", "blip2", timeout=10).send(ASKED, lambda _: None)
    for url in ("localhost:8000", "http://localhost:99999", "http://[::1", "ftp://localhost"):
        with pytest.raises(InvalidRequestError, match="http://HOST:PORT"):
            OpenAI(url, "blip2", timeout=10)
    with pytest.raises(InvalidRequestError, match="give --model"):
        OpenAI("http://localhost:8000", None, timeout=10)
