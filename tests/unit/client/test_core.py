"""Requests are encoded as the contract says, and what it cannot hold is refused."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from blipstream_client import DecodingOptions, FinishReason, Generation, TextChunk, question_prompt
from blipstream_client.answers import Trimmer
from blipstream_client.core import decode_response, encode_request
from tritonclient.grpc import service_pb2 as pb

from blipstream.contract import BLIP2_INPUTS, BLIP2_OUTPUTS
from blipstream.decoding.request import FinishReason as ServersFinishReason
from blipstream.errors import InvalidRequestError
from tests.unit.client.fake_server import _values, response

EXAMPLES: dict[str, tuple[Any, str, str, list[Any]]] = {
    "max_tokens": (7, "max_tokens", "INT32", [7]),
    "min_tokens": (2, "min_tokens", "INT32", [2]),
    "temperature": (0.5, "temperature", "FP32", [0.5]),
    "top_k": (40, "top_k", "INT32", [40]),
    "top_p": (0.25, "top_p", "FP32", [0.25]),
    "repetition_penalty": (1.5, "repetition_penalty", "FP32", [1.5]),
    "presence_penalty": (-1, "presence_penalty", "FP32", [-1.0]),
    "frequency_penalty": (0.125, "frequency_penalty", "FP32", [0.125]),
    "seed": (2**64 - 1, "random_seed", "UINT64", [2**64 - 1]),
    "stop": (["\n", "é"], "stop_words", "BYTES", [b"\n", "é".encode()]),
    "bad_words": (("ugly",), "bad_words", "BYTES", [b"ugly"]),
    "log_probs": (True, "return_log_probs", "BOOL", [True]),
}


def encode(**options: Any) -> dict[str, tuple[str, list[int], list[Any]]]:
    request = encode_request("blip2", [b"image"], "prompt", options, stream=True)
    return {tensor.name: (tensor.datatype, list(tensor.shape), _values(tensor)) for tensor in request.inputs}


def test_every_option_has_an_example_here() -> None:
    assert set(EXAMPLES) == set(DecodingOptions.__annotations__)


@pytest.mark.parametrize("option", EXAMPLES)
def test_an_option_becomes_its_tensor(option: str) -> None:
    value, tensor, datatype, expected = EXAMPLES[option]
    spec = next(spec for spec in BLIP2_INPUTS if spec.name == tensor)
    assert spec.dtype == datatype
    assert encode(**{option: value})[tensor] == (datatype, [1, len(expected)], expected)


def test_only_what_is_given_is_sent() -> None:
    assert set(encode()) == {"image", "text_input", "stream"}
    assert set(encode(seed=None, stop=[])) == {"image", "text_input", "stream"}


def test_frames_are_one_tensor() -> None:
    request = encode_request("blip2", [b"one", b"two", b"three"], "", {}, stream=False)
    (tensor,) = (tensor for tensor in request.inputs if tensor.name == "image")
    assert (list(tensor.shape), _values(tensor)) == ([1, 3], [b"one", b"two", b"three"])


def test_one_stop_string_needs_no_list() -> None:
    assert encode(stop="end")["stop_words"] == ("BYTES", [1, 1], [b"end"])


def test_numpys_numbers_are_numbers() -> None:
    options: dict[str, Any] = {"max_tokens": np.int64(5), "temperature": np.float32(0.5), "seed": np.uint64(2**63)}
    tensors = encode(**options)
    assert tensors["max_tokens"][2] == [5]
    assert tensors["temperature"][2] == [0.5]
    assert tensors["random_seed"][2] == [2**63]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 1.5}, "max_tokens must be an integer, but it is 1.5"),
        ({"max_tokens": True}, "max_tokens must be an integer, but it is True"),
        ({"max_tokens": 2**31}, f"max_tokens must be an integer from {-(2**31)} to {2**31 - 1}, but it is {2**31}"),
        ({"seed": -1}, f"seed must be an integer from 0 to {2**64 - 1}, but it is -1"),
        ({"seed": 2**64}, f"seed must be an integer from 0 to {2**64 - 1}, but it is {2**64}"),
        ({"temperature": "hot"}, "temperature must be a number, but it is 'hot'"),
        ({"top_p": True}, "top_p must be a number, but it is True"),
        ({"stop": 3}, "stop must be a string or a list of strings, but it is 3"),
        ({"stop": b"x"}, "stop must be a string or a list of strings, but it is b'x'"),
        ({"stop": ["a", 3]}, "stop must be text, but it is 3"),
        ({"stop": "\ud800"}, "stop must be text that UTF-8 can encode, but it is '\\ud800'"),
        ({"log_probs": 1}, "log_probs must be true or false, but it is 1"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        encode(**options)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("name", "hint"), [("max_new_tokens", "did you mean"), ("zzz", "the options are max_tokens, min_tokens")]
)
def test_an_unknown_option_is_refused_by_name(name: str, hint: str) -> None:
    with pytest.raises(TypeError, match=f"unknown decoding option '{name}': {hint}"):
        encode(**{name: 1})


@pytest.mark.parametrize("prompt", [3, None, b"bytes"])
def test_a_prompt_is_text(prompt: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"^prompt must be text, but it is "):
        encode_request("blip2", [b"image"], prompt, {}, stream=False)


def test_an_answer_is_read_from_the_contracts_outputs() -> None:
    message = response("é", "stop", num_output_tokens=3, tokens=[4, 5], log_probs=[-0.25, -1.0])
    assert decode_response(message, "url") == TextChunk("é", "stop", 17, 3, (4, 5), (-0.25, -1.0))
    names = {output.name for output in message.infer_response.outputs}
    assert names <= {spec.name for spec in BLIP2_OUTPUTS}


def test_an_answer_without_tokens_is_read_as_well() -> None:
    chunk = decode_response(response("", tokens=[]), "url")
    assert chunk.token_ids == ()
    assert not chunk.is_last


def test_finish_reasons_are_those_of_the_server() -> None:
    assert list(get_args(FinishReason)) == [reason.value for reason in ServersFinishReason]


def test_chunks_without_a_last_one_are_no_whole_text() -> None:
    with pytest.raises(ValueError, match="finish_reason"):
        Generation.join([TextChunk("a", None, 1, 1)])
    with pytest.raises(ValueError, match="finish_reason"):
        Generation.join([])


@pytest.mark.parametrize("cuts", [(), (1,), (1, 2, 4), (3, 6, 7), tuple(range(1, 9))])
def test_a_streamed_text_is_stripped_as_a_whole_one(cuts: tuple[int, ...]) -> None:
    text, trimmer = " \n a  b \n", Trimmer()
    pieces = [text[start:end] for start, end in zip((0, *cuts), (*cuts, None), strict=True)]
    chunks = [trimmer.trim(TextChunk(piece, None, 1, 1, (7,))) for piece in pieces]
    assert "".join(chunk.text for chunk in chunks) == text.strip()
    assert all(chunk.token_ids == (7,) for chunk in chunks)


def test_an_error_ends_a_request_whatever_else_the_response_holds() -> None:
    message = response("text", "eos")
    message.error_message = "INTERNAL: broken"
    with pytest.raises(Exception, match="broken"):
        decode_response(message, "url")
    assert isinstance(message, pb.ModelStreamInferResponse)


@pytest.mark.parametrize("template", ["", "Question:", "{} and {}", "{question}"])
def test_a_template_holds_its_question_once(template: str) -> None:
    with pytest.raises(InvalidRequestError, match="must hold"):
        question_prompt("why?", template)
