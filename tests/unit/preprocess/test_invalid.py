"""What is refused, and how images arrive as text."""

from __future__ import annotations

import base64
import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blipstream.errors import InvalidImageError
from blipstream.preprocess import FORMATS, ImageLimits, decode_image, limit_pillow, resolve_image

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))


def encoded(file_format: str = "PNG", image: Image.Image = NOISE) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises more pixels than it has data for."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def refusal(data: bytes, limits: ImageLimits | None = None) -> str:
    with pytest.raises(InvalidImageError) as caught:
        decode_image(data, limits or ImageLimits())
    return str(caught.value)


@pytest.mark.parametrize("data", [b"", b"  \n", b"data:image/png;base64,", b"data:,"])
def test_zero_bytes(data: bytes) -> None:
    assert "is empty" in refusal(data)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"%PDF-1.7 ...", "PDF file"),
        (b"<!DOCTYPE html><html>", "HTML or XML file"),
        (b"\n <svg xmlns='...'/>", "SVG drawing"),
        (b"https://example.org/cat.jpg", "URL; the image itself must be sent"),
        (b'{"image": 1}', "JSON text"),
        (b"PK\x03\x04\x14\0\0\0", "ZIP archive"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0", "MP4 or QuickTime video"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript file"),
    ],
)
def test_not_an_image_says_what_it_looks_like(data: bytes, kind: str) -> None:
    message = refusal(data)
    assert "no known format" in message
    assert f"looks like a {kind}" in message
    assert f"its {len(data)} bytes begin with {data[:12]!r}" in message


def test_other_bytes_are_quoted() -> None:
    assert r"its 5 bytes begin with b'\x00\x01\x02\x03\xff'" in refusal(b"\0\1\2\3\xff")


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM"])
@pytest.mark.parametrize("share", [0.03, 0.5, 0.9])
def test_truncated(file_format: str, share: float) -> None:
    data = encoded(file_format)
    message = refusal(data[: int(len(data) * share)])
    assert "the image is truncated or damaged" in message
    assert file_format in message


def test_damaged_in_the_middle() -> None:
    data = bytearray(encoded())
    data[200:400] = bytes(200)
    assert "truncated or damaged" in refusal(bytes(data))


def test_pixel_limit_is_checked_before_decoding() -> None:
    message = refusal(png_header(9_000, 9_000))
    assert "9000 x 9000 = 81000000 pixels, and at most 64000000 are accepted" in message
    assert "40 x" not in refusal(encoded(), ImageLimits(max_pixels=1_999))
    decode_image(encoded(), ImageLimits(max_pixels=2_000))


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_decompression_bomb_beyond_the_limit_of_pillow(side: int) -> None:
    assert f"the image has {side * side} pixels, and at most 64000000 are accepted" in refusal(png_header(side, side))


def test_the_limit_of_pillow_may_be_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    assert "the image has 2000 pixels" in refusal(encoded())
    limits = ImageLimits(max_pixels=2_000)
    with warnings.catch_warnings():
        limit_pillow(limits)
        assert decode_image(encoded(), limits).size == (50, 40)


def test_byte_limit() -> None:
    data = encoded()
    assert f"has {len(data)} bytes, and at most 1000 are accepted" in refusal(data, ImageLimits(max_bytes=1000))
    assert "and at most 1000 are accepted" in refusal(base64.b64encode(data[:1100]), ImageLimits(max_bytes=1000))
    text = base64.encodebytes(data)
    assert resolve_image(text, ImageLimits(max_bytes=len(data))) == data


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_white(mode: str) -> None:
    assert "for which no white is defined" in refusal(encoded("TIFF", Image.new(mode, (8, 8))))


@pytest.mark.parametrize("file_format", [name for name in FORMATS if name != "MPO"])
def test_base64_and_data_urls_of_every_format(file_format: str) -> None:
    image = NOISE.resize((32, 32))
    Image.init()
    if file_format not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {file_format}")
    data = encoded(file_format, image)
    text = base64.b64encode(data)
    for given_as in (
        data,
        text,
        text.rstrip(b"="),
        base64.encodebytes(data),
        base64.urlsafe_b64encode(data),
        b"data:image/x;base64," + text,
        b"data:;charset=utf-8;base64," + text.replace(b"+", b"%2B").replace(b"=", b"%3D"),
        b"DATA:image/x;BASE64," + text,
    ):
        assert resolve_image(given_as) == data
    assert decode_image(text).tobytes() == decode_image(data).tobytes()


def test_data_url_in_percent_encoding() -> None:
    data = encoded("GIF")
    assert resolve_image(b"data:image/gif," + b"".join(b"%%%02X" % byte for byte in data)) == data


def test_text_image_formats_are_not_taken_for_base64() -> None:
    assert decode_image(b"P2\n2 2\n255\n0 255\n255 0\n").size == (2, 2)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"data:image/png;base64,iVBO*w0K", "data: URL of base64, but it holds b'*'"),
        (b"iVBORw0KGgo!AAAA", "taken for base64 text, but it holds b'!'"),
        (b"abcde", "taken for base64 text, but it is not valid base64"),
        (b"data:image/png;base64", "data: URL without a comma"),
    ],
)
def test_invalid_base64(data: bytes, fault: str) -> None:
    assert fault in refusal(data)


def test_base64_of_something_else() -> None:
    assert "looks like a PDF file" in refusal(base64.b64encode(b"%PDF-1.7 and so on"))


@settings(max_examples=300, deadline=None)
@given(
    file_format=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "ICO", "QOI"]),
    edits=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_damaged_files_decode_or_are_refused(file_format: str, edits: list[tuple[int, int]]) -> None:
    """No other exception than InvalidImageError leaves the decoder, whatever the bytes."""
    data = bytearray(encoded(file_format, NOISE.resize((32, 32))))
    for position, value in edits:
        data[position % len(data)] = value
    with contextlib.suppress(InvalidImageError):
        assert decode_image(bytes(data), ImageLimits(max_pixels=100_000)).mode == "RGB"
