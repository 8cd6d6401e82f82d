"""What is refused, and how images arrive as text."""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blipstream import preprocess
from blipstream.errors import InvalidImageError
from blipstream.image_files import ImageLimits, kind_of, resolve_image
from blipstream.preprocess import FORMATS, decode_image, limit_pillow

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
        (b"\xef\xbb\xbf\n<!doctype html>", "HTML or XML file"),
        (b"\n\xff\xd8\xff\xe0\0\x10JFIF", "picture after 1 other bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (gzip.compress(b"any", mtime=0), "gzip file"),
        (b"s3://bucket/cat.jpg", "URL; the image itself must be sent"),
        (b"[137, 80, 78, 71]", "JSON text"),
        ("\xff\xd8\xff\xe0".encode(), "binary file that was read as text"),
        (b"\x89PNG\r\n".decode(errors="replace").encode(), "binary file that was read as text"),
        ("/9j/4AAQ".encode("utf-16"), "UTF-16 text"),
        (b"<!DOCTYPE html><html>", "HTML or XML file"),
        (b"\n <svg xmlns='...'/>", "SVG drawing"),
        (b"https://example.org/cat.jpg", "URL; the image itself must be sent"),
        (b'{"image": 1}', "JSON text"),
        (b"PK\x03\x04\x14\0\0\0", "ZIP archive"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0", "MP4 or QuickTime video"),
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


@pytest.mark.parametrize(
    ("text", "shown", "is_path"),
    [
        (b"/tmp/photo", "/tmp/photo", True),
        (b"photo.jpg", "photo.jpg", True),
        (rb"C:\my pictures\cat.png", r"C:\\my pictures\\cat.png", True),
        (b"../cat", "../cat", True),
        (b"abcde", "abcde", False),
        (b"not an image", "not an image", False),
        (b"ab" * 40, "ab" * 30 + "...", False),
    ],
)
def test_a_text_is_quoted_as_it_was_sent_and_a_path_named_as_such(text: bytes, shown: str, is_path: bool) -> None:
    message = refusal(text)
    assert f"the text '{shown}' was given, and an encoded image file, or base64 or a data: URL of one, was" in message
    assert ("the server opens no files" in message) == is_path


def media(main: bytes, *others: bytes) -> bytes:
    """The first box of a file of the ISO base media format."""
    return struct.pack(">I", 16 + 4 * len(others)) + b"ftyp" + main + bytes(4) + b"".join(others)


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        *((media(brand), "HEIC") for brand in (b"heic", b"heix", b"hevc", b"hevx", b"mif1", b"msf1")),
        *((media(brand), "AVIF") for brand in (b"avif", b"avis")),
        (media(b"mif1", b"miaf", b"heic"), "HEIC"),
        (media(b"mif1", b"miaf", b"avif"), "AVIF"),
        (media(b"msf1", b"avis", b"iso8"), "AVIF"),
        (media(b"crx "), "Canon raw image"),
        (media(b"isom", b"mp42", b"avc1"), "MP4 or QuickTime video"),
        (media(b"mp42") + b"heic", "MP4 or QuickTime video"),
    ],
)
def test_brands(file: bytes, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kind_of(file) == kind
    monkeypatch.setattr(preprocess, "readable_formats", lambda: ("JPEG", "PNG"))
    message = refusal(file)
    if kind in ("HEIC", "AVIF"):
        assert message.startswith(f"the image is a {kind} file, which this installation cannot read without ")
        assert message.endswith("one of JPEG, PNG was expected")
    else:
        assert f"looks like a {kind}" in message


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
    assert "`--max-image-pixels`" in message


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_jpeg_over_the_limit_of_pixels_is_decoded_reduced(options: dict[str, bool]) -> None:
    buffer = io.BytesIO()
    Image.effect_mandelbrot((400, 300), (-2, -1, 1, 1), 50).save(buffer, "JPEG", **options)
    sizes = {120_000: (400, 300), 119_999: (200, 150), 30_000: (200, 150)}
    for max_pixels, size in sizes.items():
        assert decode_image(buffer.getvalue(), ImageLimits(max_pixels=max_pixels)).size == size
    assert "400 x 300 = 120000 pixels, and at most 29999" in refusal(buffer.getvalue(), ImageLimits(max_pixels=29_999))


@pytest.mark.parametrize("body", [b"%41", b"%%4", b" A"])
def test_long_texts_take_linear_memory(body: bytes) -> None:
    limits = ImageLimits(max_bytes=3_000_000)
    text = b"data:image/png," + body * (4_000_000 // len(body))
    tracemalloc.start()
    with contextlib.suppress(InvalidImageError):
        resolve_image(text, limits)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * len(text)
    assert "and at most 3000000 are accepted" in refusal(text + text, limits)


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


@pytest.mark.parametrize("file_format", [name for name in FORMATS if name not in ("HEIF", "MPO")])
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
        b"data:image/x;base64;charset=utf-8, " + base64.encodebytes(data),
        b"image/x;base64," + text,
        b'"' + text + b'"',
        b"b'" + text + b"'",
        b'"data:image/x;base64,' + text + b'"',
        b"\xef\xbb\xbf" + text,
        b"\n  " + b" ".join(text[start : start + 76] for start in range(0, len(text), 76)),
    ):
        assert resolve_image(given_as) == data
    assert decode_image(text).tobytes() == decode_image(data).tobytes()


def test_data_url_in_percent_encoding() -> None:
    data = encoded("GIF")
    assert resolve_image(b"data:image/gif," + b"".join(b"%%%02X" % byte for byte in data)) == data
    assert resolve_image(b"data:image/gif," + base64.b64encode(data)) == data


def test_text_image_formats_are_not_taken_for_base64() -> None:
    assert decode_image(b"P2\n2 2\n255\n0 255\n255 0\n").size == (2, 2)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"data:image/png;base64,iVBO*w0K", "data: URL of base64, but it holds b'*'"),
        (b"iVBORw0KGgo!AAAA", "taken for base64 text, but it holds b'!'"),
        (b"iVBORw0KGgoAA", "taken for base64 text, but it is not valid base64"),
        (b"/9j/" + b"a b+" * 20, "taken for base64 text, but it holds spaces, probably for +"),
        (b"data:image/jpeg;base64,/9j/4 AAQ", "data: URL of base64, but it holds spaces, probably for +"),
        (base64.b64encode(base64.b64encode(encoded())), "it was encoded in base64 twice"),
        (b"data:image/png;base64," + base64.b64encode(base64.b64encode(encoded())), "encoded in base64 twice"),
        (base64.b64encode(b"data:image/png;base64," + base64.b64encode(encoded())), "encoded in base64 twice"),
        (repr(encoded()).encode(), "looks like a text of a Python bytes literal"),
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
