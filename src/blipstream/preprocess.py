"""The one image transform: encoded image file -> upright RGB -> ``pixel_values`` (3, S, S).

Servers, clients, calibration and tests use this module, so that an image means the same numbers everywhere. It needs
Pillow and NumPy alone. The numbers are bit for bit those of ``BlipImageProcessor`` of transformers in its Pillow form;
how a file becomes an RGB image follows transformers as well:

- the EXIF orientation is applied (``transformers.image_utils.load_image``);
- transparency, in whatever form the file has it, is laid over white (``BlipImageProcessor``), because the colours
  under transparent pixels are not part of the picture;
- CMYK, YCbCr, palettes and 1-bit images are converted as Pillow converts them; of an animation, the first frame counts.

One thing differs on purpose: 16-bit greyscale is scaled to 8 bits, where Pillow's conversion to RGB clips it to white.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import urllib.parse
import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from blipstream.errors import InvalidImageError
from blipstream.manifest import ImageSection

FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TIFF", "WEBP")
"""Formats that are decoded, by Pillow's names. Others are refused: some start other programs (EPS), most are obscure,
and each is a parser that a hostile file could attack."""

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"\0\0\0\x0cjP  ", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"\0\0\1\0", "ICO"),
    (b"qoif", "QOI"),
    (b"\xff\x0a", "JPEG XL image"),
    (b"\0\0\0\x0cJXL ", "JPEG XL image"),
    (b"8BPS", "Photoshop file"),
    (b"%!PS", "PostScript file"),
    (b"%PDF", "PDF file"),
    (b"PK\x03\x04", "ZIP archive"),
    (b"\x1f\x8b", "gzip file"),
    (b"\x1a\x45\xdf\xa3", "Matroska or WebM video"),
    (b"http://", "URL; the image itself must be sent"),
    (b"https://", "URL; the image itself must be sent"),
    (b"<svg", "SVG drawing"),
    (b"<", "HTML or XML file"),
    (b"{", "JSON text"),
)
"""What the first bytes of a file say that it is, for error messages: a name of ``FORMATS``, or anything else. The first
match counts."""

_BASE64_HEADS = (b"/9j/", b"iVBORw0KGgo", b"R0lGOD", b"UklGR", b"Qk", b"SUkq", b"TU0AK", b"AAAA")
"""How base64 text of the usual image formats begins."""

_NOT_BASE64 = re.compile(rb"[^A-Za-z0-9+/=]")
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_PNM_HEAD = re.compile(rb"P[1-7fFy]\s")
_COUNT_OF_PIXELS = re.compile(r"\((\d+) pixels\)")
"""In Pillow's own message about a decompression bomb."""

_RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class ImageLimits:
    """What an image may cost before it is refused."""

    max_bytes: int = 64 << 20
    """Bytes of the encoded file."""
    max_pixels: int = 64_000_000
    """Width times height, read from the file's header before anything is decoded."""


DEFAULT_LIMITS = ImageLimits()


def resolve_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """Return the bytes of an image file, given them or their text: base64 or a ``data:`` URL.

    The file itself is not looked into, so what comes back need not be an image.

    Raises:
        InvalidImageError: nothing was given, the text is not valid base64, or the file is larger than the limit.
    """
    if len(data) > 2 * limits.max_bytes:  # base64 needs 4 bytes for 3: no text of an image within the limit is longer
        raise _too_many_bytes(len(data), limits)
    if data[:5].lower() == b"data:":
        data = _from_data_url(data)
    elif _is_base64(data):
        data = _from_base64(data, "the image was taken for base64 text, but")
    if len(data) > limits.max_bytes:
        raise _too_many_bytes(len(data), limits)
    if not data:
        raise InvalidImageError("the image is empty: an encoded image file was expected, but zero bytes were given")
    return data


def decode_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS, *, reduced_to: int = 0) -> Image.Image:
    """Decode an image file, or base64 or a ``data:`` URL of one, into an upright RGB image.

    With ``reduced_to``, a JPEG file may come at a half, a quarter or an eighth of its size, both sides of which have as
    many pixels at least: the decoder then computes no more than those. Pillow's own limit on pixels
    (``PIL.Image.MAX_IMAGE_PIXELS``) holds besides ``limits``; see :func:`limit_pillow`.

    Raises:
        InvalidImageError: not an image, of an unsupported kind, truncated or damaged, or over a limit.
    """
    data = resolve_image(data, limits)
    try:
        image = Image.open(io.BytesIO(data), formats=_known_formats())
        _check_pixels(image.size, limits)
        if reduced_to:
            image.draft(None, (reduced_to, reduced_to))  # does nothing to other formats
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)
    except InvalidImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        count = _COUNT_OF_PIXELS.search(str(error))
        raise _too_many_pixels(count[1] if count else "too many", limits) from error
    except UnidentifiedImageError:
        raise _unknown_kind(data) from None
    except Exception as error:  # on hostile files Pillow's decoders raise nearly every built-in exception
        raise _damaged(data, error) from error


def limit_pillow(limits: ImageLimits) -> None:
    """Make Pillow's own limit on pixels the given one, in this whole process.

    It reaches where :func:`decode_image` does not see (an icon's inner images), and is in its way where the limit is
    larger than Pillow's. For processes that belong to the one who calls this, such as the models of a server.
    """
    Image.MAX_IMAGE_PIXELS = limits.max_pixels
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB; transparency is laid over white, 16-bit greyscale scaled to 8 bits.

    Raises:
        InvalidImageError: the mode has no defined white (floating point, 32-bit integers).
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep_grey(image)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


class ImageTransform:
    """RGB image -> ``pixel_values``, as the checkpoint's image processor does it.

    Args:
        section: size, resampling filter, mean and standard deviation, from the manifest.
        jpeg_oversampling: a large JPEG file is decoded at a reduced size that is so many times that of the model's
            image at least, which is quicker and not exact; 0 decodes all files whole.
    """

    def __init__(self, section: ImageSection, jpeg_oversampling: int = 0) -> None:
        self._size = (section.size, section.size)
        self._reduced_to = jpeg_oversampling * section.size
        self._resample = _RESAMPLE[section.resample]
        # A channel has 256 values: computed once, in the order of operations and precision of transformers.
        levels = (np.arange(256).astype(np.float64) * section.rescale_factor).astype(np.float32)
        mean, std = np.array(section.mean, np.float32), np.array(section.std, np.float32)
        self._levels = (levels - mean[:, None]) / std[:, None]  # (3, 256)

    def __call__(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """Resize and normalise an RGB image; return (3, S, S) float32."""
        pixels = np.asarray(image.resize(self._size, self._resample))  # (S, S, 3) uint8
        return np.stack([table[pixels[:, :, channel]] for channel, table in enumerate(self._levels)])

    def decode(self, data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> npt.NDArray[np.float32]:
        """Decode an image file (:func:`decode_image`) and transform it; return (3, S, S) float32.

        Raises:
            InvalidImageError: as :func:`decode_image`.
        """
        return self(decode_image(data, limits, reduced_to=self._reduced_to))


def _is_base64(data: bytes) -> bool:
    """Whether the bytes are meant as base64 text: they begin like an image in base64, or hold nothing else."""
    if data.startswith(_BASE64_HEADS):
        return True
    if _PNM_HEAD.match(data):  # the one image format that may consist of letters and digits alone
        return False
    return _NOT_BASE64.search(_plain(data[:256])) is None and _NOT_BASE64.search(_plain(data)) is None


def _plain(text: bytes) -> bytes:
    """Base64 text in the standard alphabet, without line breaks."""
    return b"".join(text.split()).translate(_URL_SAFE)


def _from_base64(text: bytes, subject: str) -> bytes:
    plain = _plain(text)
    fault = _NOT_BASE64.search(plain)
    if fault:
        raise InvalidImageError(f"{subject} it holds {fault.group()!r}, which is no character of base64")
    try:
        return base64.b64decode(plain.rstrip(b"=") + b"=" * (-len(plain.rstrip(b"=")) % 4), validate=True)
    except binascii.Error as error:
        raise InvalidImageError(f"{subject} it is not valid base64: {_sentence(error)}") from None


def _from_data_url(url: bytes) -> bytes:
    head, comma, body = url.partition(b",")
    if not comma:
        raise InvalidImageError("the image is a data: URL without a comma, after which its contents were expected")
    body = urllib.parse.unquote_to_bytes(body)
    if head.rstrip().lower().endswith(b";base64"):
        body = _from_base64(body, "the image is a data: URL of base64, but")
    return body


def _known_formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # AVIF depends on how Pillow was built


def _check_pixels(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise _too_many_pixels(f"{width} x {height} = {width * height}", limits)


def _from_deep_grey(image: Image.Image) -> Image.Image:
    sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if not sixteen_bits:
        kind = "floating-point" if image.mode == "F" else "32-bit integer"
        raise InvalidImageError(
            f"the image has {kind} pixels, for which no white is defined: 8-bit or 16-bit pixels were expected"
        )
    levels = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")


def _too_many_bytes(count: int, limits: ImageLimits) -> InvalidImageError:
    return InvalidImageError(f"the image has {count} bytes, and at most {limits.max_bytes} are accepted")


def _too_many_pixels(count: str, limits: ImageLimits) -> InvalidImageError:
    return InvalidImageError(f"the image has {count} pixels, and at most {limits.max_pixels} are accepted")


def _guess(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        return {b"avif": "AVIF", b"heic": "HEIC image"}.get(data[8:12], "MP4 or QuickTime video")
    if _PNM_HEAD.match(data):
        return "PPM"
    text = data[:64].lstrip().lower()
    return next((kind for magic, kind in _MAGIC if data.startswith(magic) or text.startswith(magic)), "")


def _unknown_kind(data: bytes) -> InvalidImageError:
    kind = _guess(data)
    if kind in _known_formats():
        return _damaged(data, EOFError("its header is incomplete"))
    hint = f" (it looks like a {kind})" if kind else ""
    return InvalidImageError(
        f"the image is in no known format{hint}: its {len(data)} bytes begin with {data[:12]!r}, "
        f"and one of {', '.join(FORMATS)} was expected"
    )


def _damaged(data: bytes, error: Exception) -> InvalidImageError:
    kind = _guess(data) or "picture"
    return InvalidImageError(
        f"the image is truncated or damaged: a {kind} file of {len(data)} bytes could not be decoded "
        f"({_sentence(error)})"
    )


def _sentence(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0].rstrip(".")
    return text or type(error).__name__
