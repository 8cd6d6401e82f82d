"""Files as cameras and other programs write them: what transformers' Pillow path reads is read alike."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from blipstream.errors import InvalidImageError
from blipstream.preprocess import ImageTransform, decode_image
from tests.unit.preprocess.test_transform import encoded, random_image, reference, section

RGB = random_image("RGB", (50, 33))
RGBA = random_image("RGBA", (50, 33))
OTHER = random_image("RGB", (50, 33), seed=1)
XMP = b'<rdf:Description tiff:Orientation="6"/>'


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(*chunks: bytes) -> bytes:
    """A PNG with chunks between its header and its pixels."""
    file = encoded(RGB)
    return file[:33] + b"".join(chunks) + file[33:]


def png_by_hand(width: int, height: int, depth: int, interlaced: int, rows: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, interlaced))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def oriented(file_format: str, value: Any, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return encoded(RGB, file_format, exif=exif, **options)


def raw_exif(*entries: tuple[int, int, int, bytes], data: bytes = b"") -> bytes:
    """EXIF of entries (tag, type, count, value of 4 bytes), and what follows them."""
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + bytes(4) + data


def patched(file: bytes, position: int, value: bytes) -> bytes:
    return file[:position] + value + file[position + len(value) :]


def animated(file_format: str, **options: Any) -> bytes:
    return encoded(RGB.copy(), file_format, save_all=True, append_images=[OTHER.copy()], **options)


def gif_on_a_larger_screen() -> bytes:
    file = patched(encoded(RGB.quantize(16), "GIF"), 6, struct.pack("<HH", 80, 60))
    return patched(file, file.index(b",\0\0\0\0") + 1, struct.pack("<HH", 10, 7))


FILES: dict[str, Callable[[], bytes]] = {
    "JPEG, garbage behind": lambda: encoded(RGB, "JPEG") + b"garbage" * 100,
    "JPEG, progressive": lambda: encoded(RGB, "JPEG", progressive=True),
    "JPEG, CMYK of Adobe": lambda: encoded(random_image("CMYK", (50, 33)), "JPEG"),
    "JPEG, two pictures of a phone": lambda: animated("MPO"),
    "JPEG, broken ICC profile": lambda: encoded(RGB, "JPEG", icc_profile=b"broken"),
    "JPEG, one pixel wide": lambda: encoded(random_image("RGB", (1, 5000)), "JPEG"),
    "JPEG, orientation in XMP": lambda: encoded(RGB, "JPEG", xmp=XMP),
    "JPEG, orientation in EXIF and XMP": lambda: oriented("JPEG", 3, xmp=XMP),
    **{f"JPEG, orientation {value!r}": lambda value=value: oriented("JPEG", value) for value in (0, 9)},
    "JPEG, long orientation": lambda: encoded(RGB, "JPEG", exif=raw_exif((0x0112, 4, 1, struct.pack("<I", 65536)))),
    "JPEG, orientation as text": lambda: encoded(RGB, "JPEG", exif=raw_exif((0x0112, 2, 2, b"6\0\0\0"))),
    **{f"TIFF, orientation {value}": lambda value=value: oriented("TIFF", value) for value in range(2, 9)},
    "WebP, orientation": lambda: oriented("WEBP", 6),
    "PNG, orientation": lambda: oriented("PNG", 5),
    "PNG, 16-bit RGB": lambda: png_by_hand(2, 1, 16, 0, b"\0" + bytes(range(0, 240, 20))),
    "PNG, interlaced": lambda: png_by_hand(1, 1, 8, 1, b"\0abc"),
    "PNG, palette with alpha": lambda: encoded(RGB.quantize(8), transparency=bytes(range(0, 240, 30))),
    "PNG, animated": lambda: animated("PNG"),
    "PNG, odd gamma": lambda: png_with(chunk(b"gAMA", b"\0\0\0\1")),
    "PNG, no end": lambda: encoded(RGB)[:-12],
    "GIF, transparent": lambda: encoded(RGB.quantize(16), "GIF", transparency=3),
    "GIF, larger screen": gif_on_a_larger_screen,
    "WebP, animated": lambda: animated("WEBP", lossless=True),
    "WebP, alpha": lambda: encoded(RGBA, "WEBP", lossless=True),
    "TIFF, pages": lambda: animated("TIFF"),
    "TIFF, LZW": lambda: encoded(RGB, "TIFF", compression="tiff_lzw"),
    "TIFF, fax": lambda: encoded(RGB.convert("1"), "TIFF", compression="group4"),
    "TIFF, CMYK": lambda: encoded(random_image("CMYK", (50, 33)), "TIFF"),
    "TIFF, alpha": lambda: encoded(RGBA, "TIFF"),
    "TIFF, big": lambda: encoded(RGB, "TIFF", big_tiff=True),
    "BMP, top down": lambda: patched(encoded(RGB, "BMP"), 22, struct.pack("<i", -33)),
    "BMP, 32 bits": lambda: encoded(RGBA, "BMP"),
    "ICO, PNG inside": lambda: encoded(random_image("RGBA", (32, 32)), "ICO", sizes=[(32, 32)]),
    "JPEG 2000, no container": lambda: encoded(RGB, "JPEG2000", no_jp2=True),
    "QOI": lambda: encoded(RGB, "QOI"),
    "PPM, text with comments": lambda: b"P3\n# a\n2 2 # b\n255\n1 2 3 4 5 6\n# c\n7 8 9 10 11 12\n",
}


@pytest.mark.parametrize("name", FILES)
def test_what_transformers_reads_is_read_alike(name: str) -> None:
    file = FILES[name]()
    expected = reference(ImageOps.exif_transpose(Image.open(io.BytesIO(file))))
    np.testing.assert_array_equal(ImageTransform(section()).decode(file), expected)


@pytest.mark.parametrize(
    "file",
    [
        encoded(RGB, "JPEG", progressive=True)[:-1],
        encoded(RGB, "JPEG")[:-2],
        png_with(patched(chunk(b"tEXt", b"abc"), 11, bytes(4))),
        png_by_hand(0, 5, 8, 0, b""),
        patched(encoded(RGB, "BMP"), 18, bytes(4)),
        b"P6 0 0 255\n",
        b"qoif" + bytes(8) + b"\3\0",
    ],
    ids=["last byte", "no end of JPEG", "checksum", "no width", "no width of BMP", "no size of PPM", "no size of QOI"],
)
def test_what_transformers_refuses_is_refused(file: bytes) -> None:
    with pytest.raises((OSError, SyntaxError)):
        Image.open(io.BytesIO(file)).load()
    with pytest.raises(InvalidImageError, match="the image is truncated or damaged"):
        decode_image(file)


TURNED = (0x0112, 3, 1, b"\6\0\0\0")
AFTER_TWO = struct.pack("<I", 8 + 2 + 24 + 4)
ODD_TAGS = {
    "signed resolution": raw_exif(TURNED, (0x011A, 10, 1, AFTER_TWO), data=struct.pack("<ii", -1, 0)),
    "maker as a rational": raw_exif((0x010F, 5, 1, AFTER_TWO), TURNED, data=struct.pack("<II", 1, 2)),
}


@pytest.mark.parametrize("name", ODD_TAGS)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_only_the_orientation_of_exif_is_read(file_format: str, name: str) -> None:
    file = encoded(RGB, file_format, exif=ODD_TAGS[name])
    np.testing.assert_array_equal(
        decode_image(file), Image.open(io.BytesIO(file)).transpose(Image.Transpose.ROTATE_270)
    )


@pytest.mark.parametrize(
    "make",
    [
        *(
            lambda file_format=file_format, exif=exif: encoded(RGB, file_format, exif=exif)
            for file_format in ("PNG", "WEBP", "JPEG")
            for exif in (b"Exif\0\0garbage!!", b"b'Exif\\x00\\x00II*'")
        ),
        lambda: png_with(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  4\nnot hexadecimal")),
    ],
)
def test_broken_exif_is_ignored(make: Callable[[], bytes]) -> None:
    file = make()
    np.testing.assert_array_equal(decode_image(file), Image.open(io.BytesIO(file)).convert("RGB"))


@pytest.mark.parametrize(("mode", "orientation"), [("RGB", 1), ("RGB", 6), ("RGBA", 1)])
def test_heic_is_read_where_pillow_heif_is_installed(mode: str, orientation: int) -> None:
    heif = pytest.importorskip("pillow_heif")
    image = random_image(mode, (7, 5)).resize((64, 48), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    heif.from_pillow(image).save(buffer, quality=95, exif=exif.tobytes())
    upright = decode_image(buffer.getvalue())
    plain = Image.new("RGBA", image.size, "white")
    plain.alpha_composite(image.convert("RGBA"))
    expected = plain.convert("RGB") if orientation == 1 else plain.convert("RGB").transpose(Image.Transpose.ROTATE_270)
    assert upright.size == expected.size
    assert np.abs(np.asarray(upright, np.int16) - np.asarray(expected)).mean() < 8
