"""Triton's JSON endpoints, ``generate`` and ``generate_stream``, with images as text."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from blipstream.triton.server import TritonServer
from tests.server.conftest import SLOTS
from tests.server.wire import LONG, ask, data_url, events, generate, occupied, post

pytestmark = pytest.mark.server


@pytest.mark.parametrize("model", ["blip2", "blip2_unary"])
def test_generate_with_base64(server: TritonServer, image: bytes, model: str) -> None:
    expected = ask(server.grpc_url, image=image, text_input="a", max_tokens=9)
    text = base64.b64encode(image).decode()
    status, body = post(server, f"{model}/generate", image=text, text_input="a", max_tokens=9)
    assert status == 200
    answer = json.loads(body)
    assert answer["text_output"] == expected.text
    assert answer["finish_reason"] == expected.finish_reason
    assert answer["num_output_tokens"] == expected.num_output_tokens
    assert answer["num_input_tokens"] == expected.num_input_tokens


def test_generate_with_a_data_url_and_nothing_else(server: TritonServer, image: bytes) -> None:
    status, body = post(server, "blip2/generate", image=data_url(image))
    assert status == 200
    assert json.loads(body)["text_output"] == ask(server.grpc_url, image=image).text


def test_generate_stream(server: TritonServer, image: bytes) -> None:
    inputs = {"text_input": "this is", "max_tokens": LONG, "min_tokens": LONG}
    expected = generate(server.grpc_url, image=image, **inputs)
    status, body = post(server, "blip2/generate_stream", image=data_url(image), stream=True, **inputs)
    assert status == 200
    parts = list(events(body))
    assert len(parts) > 1
    assert "".join(part["text_output"] for part in parts) == expected[0].text
    assert [part["finish_reason"] for part in parts[:-1]] == [""] * (len(parts) - 1)
    assert parts[-1]["finish_reason"] == "length"
    assert parts[-1]["num_output_tokens"] == LONG


def test_parameters_by_json(server: TritonServer, image: bytes) -> None:
    inputs = {"temperature": 1.25, "top_k": 30, "random_seed": 5, "max_tokens": 12, "stop_words": ["zzz", "qqq"]}
    expected = ask(server.grpc_url, image=image, **inputs)
    status, body = post(server, "blip2/generate", image=data_url(image), **inputs)
    assert status == 200
    assert json.loads(body)["text_output"] == expected.text


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"image": "data:image/png;base64,!"}, "data: URL of base64, but it holds b'!'"),
        ({"image": "abcde"}, "the text 'abcde' was given, and an encoded image file, or base64 or a data: URL"),
        ({"image": base64.b64encode(b"%PDF-1.7").decode()}, "it looks like a PDF file"),
        ({}, "neither image nor image_input was given"),
        ({"prompt": "a"}, "there is no option called 'prompt', and text_input was expected"),
        ({"max_new_tokens": 3, "temperature": 0.5}, "there is no option called 'max_new_tokens', and max_tokens was"),
        ({"parameters": {"num_beams": 3}}, "there is no option called 'num_beams', and beam_width was expected"),
        ({"colour": 1.5}, "there is no option called 'colour', and those expected are image, "),
        ({"timeout": "5s"}, "timeout must be a number of microseconds of at least 0, but it is '5s'"),
        ({"blipstream_call": "guess"}, "blipstream_call must be a random string of at least 16 characters"),
        ({"max_tokens": "10"}, "Unable to parse 'data'"),
    ],
)
def test_errors_by_json(server: TritonServer, fields: dict[str, Any], fault: str) -> None:
    for endpoint in ("blip2/generate", "blip2_unary/generate"):
        status, body = post(server, endpoint, text_input="", **fields)
        assert status >= 400
        assert fault in json.loads(body)["error"]
    _, body = post(server, "blip2/generate_stream", text_input="", **fields)
    assert fault in body.decode()


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": [9], "text_input": ["a"]},
        {"parameters": {"max_tokens": 9}, "text_input": "a"},
        {"max_tokens": 9, "text_input": "a", "stop_words": "", "bad_words": []},
        {
            "max_tokens": 9,
            "text_input": "a",
            "id": "7",
            "priority": 1,
            "sequence_id": 5,
            "timeout": 6e7,
            "X-Request-Id": 1,
        },
        {"max_tokens": 9, "text_input": "a", "exclude_input_in_output": True},
    ],
)
@pytest.mark.parametrize("endpoint", ["blip2/generate", "blip2_unary/generate"])
def test_other_ways_to_ask_the_same(server: TritonServer, image: bytes, endpoint: str, fields: dict[str, Any]) -> None:
    status, body = post(server, endpoint, image=data_url(image), **fields)
    assert status == 200
    expected = ask(server.grpc_url, image=image, text_input="a", max_tokens=9)
    assert json.loads(body)["text_output"] == expected.text


def test_a_timeout_by_json(server: TritonServer, image: bytes) -> None:
    with occupied(server, SLOTS, image):
        status, body = post(server, "blip2/generate", image=data_url(image), timeout=200_000)
    assert status >= 400
    assert "its timeout is 0.200 s" in json.loads(body)["error"]
