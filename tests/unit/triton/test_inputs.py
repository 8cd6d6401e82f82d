"""Requests: every fault is named, and what is right arrives as it was sent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from blipstream.config import ServerConfig
from blipstream.errors import InvalidImageError, InvalidRequestError, PromptTooLongError
from blipstream.instructions import InstructionEncoder
from blipstream.triton.inputs import ParsedRequest, RequestParser
from blipstream.triton.parameters import check_parameters
from tests.unit.decoding.fakes import byte_tokenizer
from tests.unit.triton.fakes import IMAGE_SIZE, make_manifest, tensors

FILE = b"\x89PNG and so on"


def parse(config: ServerConfig | None = None, **inputs: Any) -> ParsedRequest:
    return RequestParser(make_manifest(), config or ServerConfig()).parse(tensors(**inputs), {})


def pixels(value: float = 0.5, size: int = IMAGE_SIZE) -> np.ndarray:
    return np.full((1, 3, size, size), value, np.float16)


def test_an_image_alone_is_enough() -> None:
    request = parse(image=FILE)
    assert [image.file for image in request.images] == [FILE]
    assert request.text == ""
    assert not request.stream
    assert request.params.max_tokens == 20
    assert request.params.greedy


def test_a_text_is_an_instruction_where_the_qformer_reads_one() -> None:
    manifest = make_manifest(instructed=True)
    assert manifest.qformer.instruction is not None
    encoder = InstructionEncoder(byte_tokenizer(), manifest.qformer.instruction)
    parser = RequestParser(manifest, ServerConfig(), encoder)
    assert parse(image=FILE, text_input=b"ab").instruction is None
    assert parser.parse(tensors(image=FILE, text_input=b"ab"), {}).instruction == (97, 98)
    assert parser.parse(tensors(image=FILE), {}).instruction == ()
    with pytest.raises(PromptTooLongError, match="has 10 tokens for the Q-Former"):
        parser.parse(tensors(image=FILE, text_input=b"a" * 10), {})


def test_every_parameter_arrives() -> None:
    request = parse(
        image=FILE,
        text_input="ü?".encode(),
        max_tokens=9,
        min_tokens=2,
        temperature=0.5,
        top_k=7,
        top_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.75,
        random_seed=2**64 - 1,
        stop_words=[b"end", b"stop"],
        bad_words=[b"cat"],
        stream=True,
        return_log_probs=True,
        beam_width=1,
        length_penalty=1.0,
    )
    params = request.params
    assert request.text == "ü?"
    assert request.stream
    assert (params.max_tokens, params.min_tokens, params.top_k) == (9, 2, 7)
    assert (params.temperature, params.top_p, params.repetition_penalty) == (0.5, 0.25, 1.5)
    assert (params.presence_penalty, params.frequency_penalty, params.seed) == (-0.5, 0.75, 2**64 - 1)
    assert (params.stop, params.bad_words, params.log_probs) == (("end", "stop"), ("cat",), True)


@pytest.mark.parametrize(
    ("inputs", "fault"),
    [
        ({}, "neither image nor image_input"),
        ({"image": FILE, "image_input": pixels()}, "both image and image_input"),
        ({"image_input": pixels(size=9)}, "image_input must have the shape (1, 3, 8, 8), but it has (1, 3, 9, 9)"),
        ({"image_input": pixels(np.nan)}, "image_input must hold finite numbers"),
        ({"image_input": pixels(np.inf)}, "image_input must hold finite numbers"),
        ({"image": FILE, "text_input": b"ab\xff"}, "text_input must be UTF-8 text, but its byte 2, 0xff, is not"),
        ({"image": FILE, "text_input": b"a" * 65537}, "text_input must have at most 65536 bytes, but has 65537"),
        ({"image": FILE, "stop_words": [b"a" * 40000] * 2}, "stop_words must have at most 65536 bytes, but has 80000"),
        ({"image": FILE, "stop_words": [b"a"] * 1001}, "stop_words must have at most 1000 strings, but has 1001"),
        ({"image": FILE, "bad_words": [b"a"] * 1001}, "bad_words must have at most 1000 strings, but has 1001"),
        ({"image": FILE, "bad_words": [b"a" * 1025]}, "bad_words must have at most 1024 bytes in one string"),
        ({"image": FILE, "stop_words": [b"\xff"]}, "stop_words must be UTF-8 text"),
        ({"image": FILE, "bad_words": [b"a", b""]}, "bad_words must not hold an empty string"),
        ({"image": FILE, "max_tokens": 0}, "max_tokens must be an integer of at least 1, but it is 0"),
        ({"image": FILE, "max_tokens": -3}, "max_tokens must be an integer of at least 1, but it is -3"),
        ({"image": FILE, "min_tokens": -1}, "min_tokens must be an integer of at least 0"),
        ({"image": FILE, "min_tokens": 21}, "min_tokens must be at most max_tokens (20), but it is 21"),
        ({"image": FILE, "min_tokens": 2, "min_length": 3}, "min_tokens is 2 and min_length is 3"),
        ({"image": FILE, "temperature": np.nan}, "temperature must be a finite number"),
        ({"image": FILE, "temperature": -0.1}, "temperature must be a finite number of at least 0"),
        ({"image": FILE, "top_k": -1}, "top_k must be an integer from 0"),
        ({"image": FILE, "top_p": np.nan}, "top_p must be a number from 0 to 1"),
        ({"image": FILE, "top_p": 1.5}, "top_p must be a number from 0 to 1, but it is 1.5"),
        ({"image": FILE, "repetition_penalty": 0.0}, "repetition_penalty must be a finite number above 0"),
        ({"image": FILE, "repetition_penalty": np.inf}, "repetition_penalty must be a finite number above 0"),
        ({"image": FILE, "presence_penalty": np.nan}, "presence_penalty must be a finite number"),
        ({"image": FILE, "frequency_penalty": np.inf}, "frequency_penalty must be a finite number"),
        ({"image": FILE, "length_penalty": np.nan}, "length_penalty must be a finite number"),
        ({"image": FILE, "beam_width": 4}, "beam_width must be 1, for beam search is not served yet, but it is 4"),
        ({"image": FILE, "beam_width": 0}, "beam_width must be 1"),
        ({"image": FILE, "colour": b"red"}, "there is no option called 'colour', and those expected are image, "),
    ],
)
def test_faults_are_named(inputs: dict[str, Any], fault: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse(**inputs)
    assert fault in str(caught.value)


EXPECTED_OF = {
    "max_tokens": ["max_token", "max_new_tokens", "maxTokens", "max-tokens", "MAX_TOKENS", "max_length", "num_predict"],
    "text_input": ["prompt", "text", "question", "inputs", "text_imput"],
    "image": ["images", "image_url", "imagee"],
    "image and text_input": ["messages"],
    "beam_width": ["num_beams", "n", "best_of"],
    "temperature, top_k or top_p": ["do_sample"],
    "random_seed": ["seed"],
    "stop_words": ["stop", "stop_sequences"],
    "return_log_probs": ["logprobs"],
    "repetition_penalty": ["repition_penalty"],
    "those expected are image, image_input, text_input, max_tokens": ["", "colour", "user", "x" * 100_000],
}


@pytest.mark.parametrize(("expected", "name"), [(key, name) for key, names in EXPECTED_OF.items() for name in names])
@pytest.mark.parametrize("value", [5, 1.5, "a", True])
def test_a_parameter_that_nobody_reads_is_refused_with_the_right_name(expected: str, name: str, value: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_parameters({"timeout": 5, name: value})
    assert f"there is no option called {name[:64]!r}"[:80] in str(caught.value).replace("...", "")
    assert expected in str(caught.value).partition(", and ")[2]
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("parameters", "fault"),
    [
        ({"max_tokens": 5}, "max_tokens must be an input, but it was given as a parameter"),
        ({"timeout": "5s"}, "timeout must be a number of microseconds of at least 0, but it is '5s'"),
        ({"timeout": -1}, "but it is -1"),
        ({"timeout": True}, "but it is True"),
        ({"timeout": float("nan")}, "but it is nan"),
        ({"blipstream_call": "short"}, "blipstream_call must be a random string of at least 16 characters"),
        ({"blipstream_call": 5}, "blipstream_call must be a random string"),
    ],
)
def test_a_parameter_at_fault_is_named(parameters: dict[str, Any], fault: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        RequestParser(make_manifest(), ServerConfig()).parse(tensors(image=FILE), parameters)
    assert fault in str(caught.value)


def test_what_triton_and_its_clients_add_is_let_pass() -> None:
    added: dict[str, Any] = {"id": "x", "priority": 1, "sequence_id": 5, "sequence_start": True, "sequence_end": False}
    headers = {"X-Request-Id": "a", "user-agent": "b", "Host": "c", "traceparent": "d"}
    triton = {"triton_enable_empty_final_response": True, "binary_data_output": False}
    check_parameters({**added, **headers, **triton, "timeout": 2.5, "blipstream_call": "0123456789abcdef"})


@pytest.mark.parametrize(
    ("given", "echo"),
    [({}, False), ({"exclude_input_in_output": True}, False), ({"exclude_input_in_output": False}, True)],
)
def test_the_text_is_echoed_only_when_asked_for(given: dict[str, bool], echo: bool) -> None:
    assert parse(image=FILE, text_input=b"a", **given).echo is echo


def test_an_input_of_two_elements_is_refused() -> None:
    inputs = {**tensors(image=FILE), "max_tokens": np.array([[3, 4]], np.int32)}
    with pytest.raises(InvalidRequestError, match=r"max_tokens must hold one element, but its shape is \(1, 2\)"):
        RequestParser(make_manifest(), ServerConfig()).parse(inputs, {})


def test_frames_arrive_in_their_order() -> None:
    files = [b"\x89PNG %d" % index for index in range(4)]
    parser = RequestParser(make_manifest(num_frames=4), ServerConfig())
    given = np.array([files], np.object_)
    assert [image.file for image in parser.parse({"image": given}, {}).images] == files
    with pytest.raises(InvalidRequestError, match="image must hold 4 files, one for each frame, but it holds 3"):
        parser.parse({"image": given[:, :3]}, {})
    with pytest.raises(InvalidRequestError, match="image must hold one file, but it holds 4"):
        RequestParser(make_manifest(), ServerConfig()).parse({"image": given}, {})
    with pytest.raises(InvalidRequestError, match="image_input holds the pixels of one image, and this model rea"):
        parser.parse(tensors(image_input=pixels()), {})


def test_min_length_is_min_tokens() -> None:
    assert parse(image=FILE, min_length=3).params.min_tokens == 3
    assert parse(image=FILE, min_length=3, min_tokens=3).params.min_tokens == 3


def test_one_empty_stop_word_means_none() -> None:
    assert parse(image=FILE, stop_words=[b""]).params.stop == ()


def test_the_byte_limit_of_images_is_the_configured_one() -> None:
    with pytest.raises(InvalidImageError, match="has 5000 bytes, and at most 5 are accepted"):
        parse(ServerConfig(max_image_bytes=5), image=FILE + bytes(5000 - len(FILE)))


def test_keys_follow_what_was_sent() -> None:
    plain = parse(image=FILE).images[0].key
    assert parse(image=FILE).images[0].key == plain
    assert parse(image=FILE + b"!").images[0].key != plain


def test_pixels_and_files_never_share_a_key() -> None:
    parsed = parse(image_input=pixels()).images[0]
    assert parsed.pixels is not None
    assert parsed.pixels.dtype == np.float32
    assert parsed.pixels.shape == (3, IMAGE_SIZE, IMAGE_SIZE)
    assert parse(image=pixels().tobytes()).images[0].key != parsed.key
    assert parse(image_input=pixels(0.25)).images[0].key != parsed.key
