"""Images as the caller has them, as the bytes of encoded files."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from blipstream.errors import InvalidImageError

if TYPE_CHECKING:
    from PIL.Image import Image

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image"
"""A path, the bytes of an encoded image (JPEG, PNG, WebP, ...), a file opened in binary mode, or a Pillow image."""

Images: TypeAlias = "ImageSource | list[ImageSource] | tuple[ImageSource, ...]"
"""One image, or the frames of a video in their order, for a model that reads several."""

_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"})
"""Pillow's pixel modes that PNG keeps as they are."""

_WITH_ALPHA = {"PA": "RGBA", "La": "LA", "RGBa": "RGBA"}
"""For each other mode with transparency, the one that it is sent in; what is left is sent as RGB."""


def image_files(images: Images) -> list[bytes]:
    """The bytes of each encoded image file (:func:`image_bytes`).

    Raises:
        InvalidImageError: as :func:`image_bytes`, or there is no image among them.
        TypeError: as :func:`image_bytes`.
    """
    files = [image_bytes(image) for image in (images if isinstance(images, list | tuple) else [images])]
    if not files:
        raise InvalidImageError("no image was given: an image, or a list of frames, was expected")
    return files


def image_bytes(image: ImageSource) -> bytes:
    """The bytes of an encoded image file. What they hold is for the server to judge.

    A Pillow image is sent as PNG, turned upright as its EXIF orientation says, so no pixel changes.

    Raises:
        InvalidImageError: a file that cannot be read, a file in text mode, an image without bytes, or a Pillow
            image that cannot be loaded or written.
        TypeError: none of the kinds in :data:`ImageSource`.
    """
    data = _read(image)
    if not data:
        name = f"{os.fspath(image)!r} " if isinstance(image, str | os.PathLike) else ""
        raise InvalidImageError(f"the image {name}is empty: it must be an encoded image file")
    return data


def _read(image: ImageSource) -> bytes:
    if isinstance(image, str | os.PathLike):
        try:
            return Path(image).read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InvalidImageError(f"the image {os.fspath(image)!r} cannot be read: {reason}") from None
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if _is_pillow(image):
        return _encode_png(image)  # type: ignore[arg-type]
    if hasattr(image, "read"):
        return _read_open(image)
    raise TypeError(
        "an image must be a path, bytes, a file opened in binary mode or a Pillow image, "
        f"but it is of the type {type(image).__name__}"
    )


def _read_open(file: Any) -> bytes:
    if isinstance(file, io.TextIOBase):
        raise InvalidImageError("an image file must be opened in binary mode, but it is opened as text")
    try:
        data = file.read()
    except (OSError, ValueError) as error:
        raise InvalidImageError(f"the image file cannot be read: {error}") from None
    if not isinstance(data, bytes):
        raise InvalidImageError(f"reading an image file must give bytes, but it gave {type(data).__name__}")
    return data


def _is_pillow(image: object) -> bool:
    """Whether it is a Pillow image; Pillow is not imported, because such an image cannot exist without it."""
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(image, module.Image)


def _encode_png(image: Image) -> bytes:
    from blipstream.orientation import upright

    buffer = io.BytesIO()
    try:
        image.load()
        shown = upright(image)
        if shown.mode not in _PNG_MODES:
            shown = shown.convert(_WITH_ALPHA.get(shown.mode, "RGB"))
        shown.save(buffer, "PNG", compress_level=1, exif=b"", icc_profile=None)
    except Exception as error:  # Pillow's decoders and encoders raise nearly every built-in exception
        raise InvalidImageError(f"the Pillow image cannot be sent as PNG: {error or type(error).__name__}") from error
    return buffer.getvalue()
