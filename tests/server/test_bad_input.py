"""Bad input is refused by its own clear error, odd input is answered rightly, and the neighbours notice neither."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from PIL import Image

from blipstream.triton.server import TritonServer
from tests.server.conftest import ROW_TOKENS
from tests.server.wire import Reply, Stream, ask, ask_unary, generate, infer_inputs, png, refusal
from tests.support.checkpoints import TinySizes, make_images
from tests.support.servers import Serving

pytestmark = pytest.mark.server

SIZE = TinySizes().image_size
PICTURE = make_images(1, seed=2)[0]


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few hundred bytes that unpacks to ``side`` x ``side`` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side // 8 + 1) * side), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def pixels(value: float = 0.0, size: int = SIZE) -> np.ndarray:
    return np.full((1, 3, size, size), value, np.float16)


GOOD = png(PICTURE)
INVALID = "StatusCode.INVALID_ARGUMENT"

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no image": ({"text_input": ""}, "neither image nor image_input was given"),
    "both images": ({"image": GOOD, "image_input": pixels()}, "both image and image_input were given"),
    "zero bytes": ({"image": b""}, "the image is empty"),
    "not an image": ({"image": b"%PDF-1.7 text"}, "in no known format (it looks like a PDF file)"),
    "a path": ({"image": b"/tmp/photo"}, "the text '/tmp/photo' was given, and an encoded image file"),
    "base64 twice": ({"image": base64.b64encode(base64.b64encode(GOOD))}, "it was encoded in base64 twice"),
    "truncated": ({"image": GOOD[: len(GOOD) // 2]}, "truncated or damaged"),
    "decompression bomb": ({"image": bomb(30_000)}, "the image has 900000000 pixels, and at most 2000000 are accepted"),
    "too many bytes": ({"image": GOOD + bytes(5 << 20)}, "bytes, and at most 4194304 are accepted"),
    "invalid base64": ({"image": b"data:image/png;base64,iVBO*"}, "data: URL of base64, but it holds b'*'"),
    "pixels of another size": ({"image_input": pixels(size=SIZE + 1)}, "image_input must have the shape"),
    "pixels that are NaN": ({"image_input": pixels(np.nan)}, "image_input must hold finite numbers"),
    "invalid UTF-8": ({"image": GOOD, "text_input": b"a\xc3("}, "text_input must be UTF-8 text, but its byte 1, 0xc3"),
    "prompt too long": ({"image": GOOD, "text_input": "a " * ROW_TOKENS}, "leave room for an answer"),
    "too much text": ({"image": GOOD, "text_input": "x" * 70_000}, "text_input must have at most 65536 bytes"),
    "temperature NaN": ({"image": GOOD, "temperature": np.nan}, "temperature must be a finite number"),
    "temperature negative": ({"image": GOOD, "temperature": -1.0}, "temperature must be a finite number of at least 0"),
    "top_p NaN": ({"image": GOOD, "top_p": np.nan}, "top_p must be a number from 0 to 1"),
    "top_k negative": ({"image": GOOD, "top_k": -1}, "top_k must be an integer from 0"),
    "repetition_penalty zero": ({"image": GOOD, "repetition_penalty": 0.0}, "repetition_penalty must be"),
    "presence_penalty NaN": ({"image": GOOD, "presence_penalty": np.nan}, "presence_penalty must be a finite number"),
    "length_penalty NaN": ({"image": GOOD, "length_penalty": np.nan}, "length_penalty must be a finite number"),
    "max_tokens negative": ({"image": GOOD, "max_tokens": -5}, "max_tokens must be an integer of at least 1"),
    "min_tokens negative": ({"image": GOOD, "min_tokens": -5}, "min_tokens must be an integer of at least 0"),
    "beams": ({"image": GOOD, "beam_width": 3}, "beam search is not served yet"),
    "empty stop word": ({"image": GOOD, "stop_words": [b"a", b""]}, "stop_words must not hold an empty string"),
    "many stop words": ({"image": GOOD, "stop_words": [b"a"] * 1001}, "stop_words must have at most 1000 strings"),
    "long bad word": ({"image": GOOD, "bad_words": [b"a" * 1025]}, "bad_words must have at most 1024 bytes in one str"),
    "wrong shape": (
        {"image": GOOD, "max_tokens": np.ones((1, 2), np.int32)},
        "unexpected shape for input 'max_tokens'",
    ),
    "batch of two": ({"image": np.array([[GOOD], [GOOD]], np.object_)}, "batch-size must be <= 1"),
}


@pytest.fixture(scope="module")
def expected(serving: Serving) -> list[int]:
    """Tokens for a sound request."""
    return ask(serving.ready().grpc_url, image=GOOD, max_tokens=10).token_ids


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_its_fault_named(server: TritonServer, expected: list[int], name: str) -> None:
    inputs, fault = BAD[name]
    status, message = refusal(lambda: generate(server.grpc_url, **inputs))
    assert fault in message
    assert "\n" not in message
    status, message = refusal(lambda: ask_unary(server.grpc_url, **inputs))
    assert fault in message
    assert status == INVALID
    assert ask(server.grpc_url, image=GOOD, max_tokens=10).token_ids == expected


def test_a_wrong_type_is_refused(server: TritonServer) -> None:
    tensor = triton.InferInput("max_tokens", [1, 1], "FP32")
    tensor.set_data_from_numpy(np.ones((1, 1), np.float32))
    with triton.InferenceServerClient(server.grpc_url) as client:
        _, message = refusal(lambda: client.infer("blip2_unary", [*infer_inputs(image=GOOD), tensor]))
    assert "data-type is 'FP32'" in message
    assert "expects 'INT32'" in message


@pytest.mark.parametrize(
    ("parameters", "fault"),
    [
        ({"max_new_tokens": 5}, "there is no option called 'max_new_tokens', and max_tokens was expected"),
        ({"max_tokens": 5}, "max_tokens must be an input, but it was given as a parameter"),
        ({"colour": 1.5}, "there is no option called 'colour'"),
        (
            {"blipstream_cancel": "0123456789abcdef"},
            "blipstream_cancel must be sent to blip2, but it was",
        ),
    ],
)
def test_unknown_parameters_are_refused(server: TritonServer, parameters: dict[str, Any], fault: str) -> None:
    with triton.InferenceServerClient(server.grpc_url) as client:
        inputs = infer_inputs(image=GOOD)
        status, message = refusal(lambda: client.infer("blip2_unary", inputs, parameters=parameters))
    assert fault in message
    assert status == INVALID


def test_neighbours_of_bad_requests_are_untouched(server: TritonServer, expected: list[int]) -> None:
    """Sound requests with images that nobody sent before, in between all the bad ones at once."""
    faults = [inputs for inputs, _ in BAD.values()]
    pictures = [png(image) for image in make_images(len(faults), seed=77)]

    def sound(picture: bytes) -> Reply:
        return ask(server.grpc_url, image=picture, max_tokens=6)

    with ThreadPoolExecutor(8) as pool:
        refusals = [
            pool.submit(refusal, lambda inputs=inputs: generate(server.grpc_url, **inputs)) for inputs in faults
        ]
        together = list(pool.map(sound, pictures))
        messages = [future.result()[1] for future in refusals]
    for name, message in zip(BAD, messages, strict=True):
        assert BAD[name][1] in message
    again = [ask(server.grpc_url, image=picture + b"\0", max_tokens=6) for picture in pictures]  # not from the cache
    assert [reply.token_ids for reply in together] == [reply.token_ids for reply in again]
    assert ask(server.grpc_url, image=GOOD, max_tokens=10).token_ids == expected


def test_bad_images_in_a_batch_of_preprocess_fail_alone(server: TritonServer) -> None:
    """The same, seen from the model that batches: each request of it has its own answer or error."""
    files = [GOOD, b"no image", GOOD[:100], GOOD, b"", GOOD] * 4
    with triton.InferenceServerClient(server.grpc_url) as client:

        def preprocess(file: bytes) -> Any:
            try:
                return client.infer("preprocess", infer_inputs(image=file)).as_numpy("pixel_values")
            except triton.InferenceServerException as error:
                return str(error.message())

        with ThreadPoolExecutor(len(files)) as pool:
            results = list(pool.map(preprocess, files))
    for file, result in zip(files, results, strict=True):
        if file == GOOD:
            np.testing.assert_array_equal(result, results[0])
        else:
            assert result.startswith("INVALID_ARGUMENT: the image is ")


def test_pixels_that_are_not_finite_fail_alone_in_a_batch_of_the_vision_encoder(server: TritonServer) -> None:
    values = [0.5, np.nan, 1.0, np.inf, 0.5, 1.0] * 4
    with triton.InferenceServerClient(server.grpc_url) as client:

        def encode(value: float) -> Any:
            tensor = triton.InferInput("pixel_values", [1, 3, SIZE, SIZE], "FP32")
            tensor.set_data_from_numpy(np.full((1, 3, SIZE, SIZE), value, np.float32))
            try:
                return client.infer("vision_encoder", [tensor]).as_numpy("image_embeds")
            except triton.InferenceServerException as error:
                return str(error.message())

        with ThreadPoolExecutor(len(values)) as pool:
            results = list(pool.map(encode, values))
    for value, result in zip(values, results, strict=True):
        if np.isfinite(value):
            np.testing.assert_allclose(result, results[values.index(value)], atol=1e-5)
        else:
            assert result == "INVALID_ARGUMENT: pixel_values must hold finite numbers, but some are NaN or infinite"


# --- odd images, answered as the RGB image that they show ------------------------------------------------------------


def exif_rotated() -> tuple[bytes, Image.Image]:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: upright is a quarter turn clockwise
    return encoded(PICTURE, "PNG", exif=exif), PICTURE.transpose(Image.Transpose.ROTATE_270)


def cmyk() -> tuple[bytes, Image.Image]:
    data = encoded(PICTURE.convert("CMYK"), "JPEG", quality=95)
    return data, Image.open(io.BytesIO(data)).convert("RGB")


def sixteen_bit() -> tuple[bytes, Image.Image]:
    grey = PICTURE.convert("L")
    return encoded(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), "PNG"), grey.convert("RGB")


def palette_with_alpha() -> tuple[bytes, Image.Image]:
    palette = PICTURE.quantize(16)
    alphas = bytes(range(0, 256, 16))
    white = Image.new("RGBA", palette.size, "white")
    data = encoded(palette, "PNG", transparency=alphas)
    return data, Image.alpha_composite(white, Image.open(io.BytesIO(data)).convert("RGBA")).convert("RGB")


def animated() -> tuple[bytes, Image.Image]:
    frames = [PICTURE.quantize(64).convert("RGB"), Image.new("RGB", PICTURE.size, "red")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    return data, Image.open(io.BytesIO(data)).convert("RGB")


def strip() -> tuple[bytes, Image.Image]:
    image = PICTURE.resize((1, 10_000))
    return encoded(image, "PNG"), image


def one_bit() -> tuple[bytes, Image.Image]:
    image = PICTURE.convert("1")
    return encoded(image, "PNG"), image.convert("RGB")


def webp() -> tuple[bytes, Image.Image]:
    return encoded(PICTURE, "WEBP", lossless=True), PICTURE


@pytest.mark.parametrize("make", [exif_rotated, cmyk, sixteen_bit, palette_with_alpha, animated, strip, one_bit, webp])
def test_odd_images_are_answered_as_what_they_show(server: TritonServer, make: Any) -> None:
    data, shown = make()
    inputs = {"max_tokens": 12, "min_tokens": 12, "return_log_probs": True}
    odd = ask(server.grpc_url, image=data, **inputs)
    plain = ask(server.grpc_url, image=png(shown), **inputs)
    assert odd.token_ids == plain.token_ids
    scores = [reply.result.as_numpy("cum_log_probs")[0, 0] for reply in (odd, plain)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_a_refused_stream_ends_and_its_connection_goes_on(server: TritonServer) -> None:
    with Stream(server.grpc_url, image=b"", stream=True) as stream:
        assert "the image is empty" in refusal(stream.next)[1]
    assert generate(server.grpc_url, image=GOOD, stream=True, max_tokens=3)[-1].finish_reason
