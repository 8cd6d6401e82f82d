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

import functools
import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, JpegImagePlugin, UnidentifiedImageError

from blipstream.errors import InvalidImageError
from blipstream.extras import install
from blipstream.image_files import DEFAULT_LIMITS, ImageLimits, kind_of, one_line, resolve_image
from blipstream.orientation import upright

if TYPE_CHECKING:
    from blipstream.manifest import ImageSection  # what it needs would slow down the start of a process that decodes

FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TIFF", "WEBP")
"""Formats that are decoded, by Pillow's names. Others are refused: some start other programs (EPS), most are obscure,
and each is a parser that a hostile file could attack."""

_COUNT_OF_PIXELS = re.compile(r"\((\d+) pixels\)")
"""In Pillow's own message about a decompression bomb."""

_REDUCIBLE = 4
"""A JPEG file may have so many times the limit of pixels: those that are decoded keep the limit."""

_BAND_PIXELS = 1 << 20

_RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class CostlyImageError(Exception):
    """Decoding the image takes more pixels than the caller wants to decode at once; the image may be sound."""


def decode_image(
    data: bytes, limits: ImageLimits = DEFAULT_LIMITS, *, reduced_to: int = 0, costly_pixels: float = math.inf
) -> Image.Image:
    """Decode an image file, or base64 or a ``data:`` URL of one, into an upright RGB image.

    With ``reduced_to``, a JPEG file may come at a half, a quarter or an eighth of its size, both sides of which have as
    many pixels at least: the decoder then computes no more than those. Pillow's own limit on pixels
    (``PIL.Image.MAX_IMAGE_PIXELS``) holds besides ``limits``; see :func:`limit_pillow`.

    Raises:
        InvalidImageError: not an image, of an unsupported kind, truncated or damaged, or over a limit.
        CostlyImageError: nothing was decoded, because more than ``costly_pixels`` would have been.
    """
    file = resolve_image(data, limits)
    with _faults_named(file, limits):
        image = _open(file, limits, reduced_to)
        if math.prod(image.size) > costly_pixels:
            raise CostlyImageError
        image.load()
        return upright(to_rgb(image), image)


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
        return _over_white(image)
    return image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    """Lay an image with transparency over white, in bands: of a large image, the layers would take gigabytes."""
    whole = Image.new("RGB", image.size)
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        layer = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        whole.paste(Image.alpha_composite(white, layer).convert("RGB"), (0, top))
    return whole


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
        return self.normalise(self.resize(image))

    def resize(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Resize an RGB image; return (S, S, 3) uint8."""
        return np.asarray(image.resize(self._size, self._resample))

    def normalise(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Normalise pixels (S, S, 3) of :meth:`resize`; return (3, S, S) float32."""
        return np.stack([table[pixels[:, :, channel]] for channel, table in enumerate(self._levels)])

    def decode(self, data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> npt.NDArray[np.float32]:
        """Decode an image file (:func:`decode_image`) and transform it; return (3, S, S) float32.

        Raises:
            InvalidImageError: as :func:`decode_image`.
        """
        return self.normalise(self.decode_resized(data, limits))

    def decode_resized(
        self, data: bytes, limits: ImageLimits, costly_pixels: float = math.inf
    ) -> npt.NDArray[np.uint8]:
        """Decode an image file (:func:`decode_image`) and resize it; return (S, S, 3) uint8.

        Raises:
            InvalidImageError: as :func:`decode_image`.
            CostlyImageError: as :func:`decode_image`.
        """
        return self.resize(decode_image(data, limits, reduced_to=self._reduced_to, costly_pixels=costly_pixels))


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """The formats that this installation reads, by Pillow's names: AVIF and HEIF depend on it."""
    Image.init()
    try:
        import pillow_heif
    except ImportError:
        pass
    else:
        pillow_heif.register_heif_opener(thumbnails=False)
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
def _faults_named(file: bytes, limits: ImageLimits) -> Iterator[None]:
    """Turn whatever Pillow raises about a file into an :class:`InvalidImageError`."""
    try:
        yield
    except (InvalidImageError, CostlyImageError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        count = _COUNT_OF_PIXELS.search(str(error))
        raise limits.too_many_pixels(count[1] if count else "too many") from error
    except UnidentifiedImageError:
        raise _unknown_kind(file) from None
    except Exception as error:  # on hostile files Pillow's decoders raise nearly every built-in exception
        raise _damaged(file, error) from error


def _open(file: bytes, limits: ImageLimits, reduced_to: int) -> Image.Image:
    """Read the header of a file, and have a JPEG decoded at a reduced size if it must be, or may be."""
    if kind_of(file) == "JPEG":  # not by Image.open, which reads all pictures of a phone's file
        image: Image.Image = JpegImagePlugin.JpegImageFile(io.BytesIO(file))
        reducible = _REDUCIBLE
    else:
        image, reducible = Image.open(io.BytesIO(file), formats=readable_formats()), 1
    (width, height), scale = image.size, 1
    if width * height > reducible * limits.max_pixels:
        raise limits.too_many_pixels(f"{width} x {height} = {width * height}")
    while -(-width // scale) * -(-height // scale) > limits.max_pixels:
        scale *= 2
    if scale > 1 or reduced_to:  # draft does nothing to other formats
        image.draft(None, (_reduced(width, scale, reduced_to), _reduced(height, scale, reduced_to)))
    if math.prod(image.size) > limits.max_pixels:
        raise limits.too_many_pixels(f"{width} x {height} = {width * height}")
    return image


def _reduced(side: int, scale: int, reduced_to: int) -> int:
    """Pixels of a side that are wanted at least."""
    return min(max(1, side // scale), reduced_to or side)


def _from_deep_grey(image: Image.Image) -> Image.Image:
    sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if not sixteen_bits:
        kind = "floating-point" if image.mode == "F" else "32-bit integer"
        raise InvalidImageError(
            f"the image has {kind} pixels, for which no white is defined: 8-bit or 16-bit pixels were expected"
        )
    levels = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")


def _unknown_kind(file: bytes) -> InvalidImageError:
    kind = kind_of(file)
    name = {"HEIC": "HEIF"}.get(kind, kind)
    readable = readable_formats()
    if name in readable:
        return _damaged(file, EOFError("its header is incomplete or damaged"))
    if name in FORMATS:
        needed = install("heic") if kind == "HEIC" else "a Pillow that was built with it"
        return InvalidImageError(
            f"the image is a {kind} file, which this installation cannot read without {needed}: "
            f"one of {', '.join(readable)} was expected"
        )
    hint = f" (it looks like a {kind})" if kind else ""
    return InvalidImageError(
        f"the image is in no known format{hint}: its {len(file)} bytes begin with {file[:12]!r}, "
        f"and one of {', '.join(readable)} was expected"
    )


def _damaged(file: bytes, error: Exception) -> InvalidImageError:
    return InvalidImageError(
        f"the image is truncated or damaged: a {kind_of(file) or 'picture'} file of {len(file)} bytes could not be "
        f"decoded ({one_line(error)})"
    )
