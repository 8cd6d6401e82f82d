"""Images in whatever form the caller has them."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blipstream_client.images import image_bytes, image_files
from PIL import Image

from blipstream.errors import InvalidImageError
from blipstream.preprocess import decode_image
from tests.unit.preprocess.test_files import ODD_TAGS, TURNED, raw_exif

DATA = b"\x89PNG not really"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    path.write_bytes(DATA)
    return path


def test_a_path_is_read(file: Path) -> None:
    assert image_bytes(file) == DATA
    assert image_bytes(str(file)) == DATA


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, io.BytesIO])
def test_bytes_are_taken_as_they_are(kind: Any) -> None:
    assert image_bytes(kind(DATA)) == DATA


def test_an_open_file_is_read(file: Path) -> None:
    with file.open("rb") as opened:
        assert image_bytes(opened) == DATA


def test_what_cannot_be_read_is_named(tmp_path: Path, file: Path) -> None:
    with pytest.raises(InvalidImageError, match=r"^the image '.*none\.png' cannot be read: No such file or directory$"):
        image_bytes(tmp_path / "none.png")
    with pytest.raises(InvalidImageError, match=r"cannot be read: Is a directory$"):
        image_bytes(tmp_path)
    with pytest.raises(InvalidImageError, match=r"cannot be read: .*null"):
        image_bytes("a\0b")


def test_a_file_is_open_and_binary(file: Path) -> None:
    with (
        file.open() as text,
        pytest.raises(InvalidImageError, match=r"must be opened in binary mode, but it is opened"),
    ):
        image_bytes(text)  # type: ignore[arg-type]
    with file.open("rb") as opened:
        pass
    with pytest.raises(InvalidImageError, match=r"^the image file cannot be read: .* closed file"):
        image_bytes(opened)
    with pytest.raises(InvalidImageError, match=r"must give bytes, but it gave str"):
        image_bytes(Text())  # type: ignore[arg-type]


class Text:
    def read(self) -> str:
        return "text"


def test_an_image_without_bytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    with pytest.raises(InvalidImageError, match=r"^the image '.*empty\.png' is empty: "):
        image_bytes(tmp_path / "empty.png")
    with pytest.raises(InvalidImageError, match=r"^the image is empty: "):
        image_bytes(b"")


@pytest.mark.parametrize("image", [None, 3, ["a.png"]])
def test_anything_else_is_no_image(image: Any) -> None:
    with pytest.raises(TypeError, match=f"but it is of the type {type(image).__name__}"):
        image_bytes(image)


# --- Pillow's images -------------------------------------------------------------------------------------------------


def noise(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "PA", "La", "RGBa"])
def test_a_pillow_image_means_the_same_to_the_server(mode: str) -> None:
    by_way_of = {"P": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "HSV": "RGB", "La": "LA"}
    image = Image.fromarray(noise(7, 5, 4)).convert(by_way_of.get(mode, "RGBA")).convert(mode)
    sent = Image.open(io.BytesIO(image_bytes(image)))
    plain = {"La": "LA", "PA": "RGBA", "LA": "LA", "RGBA": "RGBA", "RGBa": "RGBA"}.get(mode, "RGB")
    np.testing.assert_array_equal(np.asarray(sent.convert(plain)), np.asarray(image.convert(plain)))


def test_sixteen_bits_stay_sixteen_bits() -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (4, 6), dtype=np.uint16)
    sent = Image.open(io.BytesIO(image_bytes(Image.fromarray(values))))
    np.testing.assert_array_equal(np.asarray(sent).astype(np.uint16), values)


@pytest.mark.parametrize(
    ("exif", "size"),
    [
        (raw_exif(TURNED), (4, 6)),
        *((exif, (4, 6)) for exif in ODD_TAGS.values()),
        (b"Exif\0\0garbage!!", (6, 4)),
    ],
)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_an_image_is_sent_upright(file_format: str, exif: bytes, size: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(4, 6, 3)).save(buffer, file_format, exif=exif)
    file = buffer.getvalue()
    turned, as_sent = decode_image(file), decode_image(image_bytes(Image.open(io.BytesIO(file))))
    assert turned.size == size
    np.testing.assert_array_equal(np.asarray(as_sent), np.asarray(turned))


def test_a_pillow_image_that_cannot_be_loaded_is_refused() -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(40, 60, 3)).save(buffer, "PNG")
    cut = Image.open(io.BytesIO(buffer.getvalue()[:2000]))
    with pytest.raises(InvalidImageError, match=r"^the Pillow image cannot be sent as PNG: .*truncated"):
        image_bytes(cut)


def test_pillow_is_imported_by_the_caller_alone() -> None:
    code = (
        "import sys; from blipstream_client.images import image_bytes; image_bytes(b'x');"
        "assert not any(name.partition('.')[0] == 'PIL' for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_list_is_frames_in_their_order() -> None:
    assert image_files(DATA) == [DATA]
    assert image_files([DATA, b"other", io.BytesIO(b"third")]) == image_files((DATA, b"other", b"third"))
    with pytest.raises(InvalidImageError, match="no image was given: an image, or a list of frames, was expected"):
        image_files([])
    with pytest.raises(InvalidImageError, match="is empty"):
        image_files([DATA, b""])
