"""What is given as an image, before anything decodes it: a file, or the text that stands for one; and of which kind."""

from __future__ import annotations

import base64
import binascii
import re
import urllib.parse
from dataclasses import dataclass

from blipstream.errors import InvalidImageError

EXPECTED = "an encoded image file, or base64 or a data: URL of one, was expected"


@dataclass(frozen=True)
class ImageLimits:
    """What an image may cost before it is refused."""

    max_bytes: int = 64 << 20
    """Bytes of the encoded file."""
    max_pixels: int = 64_000_000
    """Pixels that are decoded. A JPEG file may have four times as many: it is then decoded at a reduced size."""

    def check_length(self, data: bytes) -> None:
        """Check what was sent by its length only. Base64 needs 4 bytes for 3, and line breaks and escapes some more.

        Raises:
            InvalidImageError: no file within the limit is as long, however it is written.
        """
        if len(data) > self.max_bytes + self.max_bytes // 2 + 4096:
            raise self.too_many_bytes(len(data))

    def too_many_bytes(self, count: int) -> InvalidImageError:
        """The error for a file, or a text, of so many bytes."""
        return InvalidImageError(
            f"the image has {count} bytes, and at most {self.max_bytes} are accepted "
            "(`--max-image-bytes` of the server)"
        )

    def too_many_pixels(self, count: str) -> InvalidImageError:
        """The error for an image of so many pixels."""
        return InvalidImageError(
            f"the image has {count} pixels, and at most {self.max_pixels} are accepted "
            "(`--max-image-pixels` of the server)"
        )


DEFAULT_LIMITS = ImageLimits()

_BASE64_HEADS = (b"/9j/", b"iVBORw0KGgo", b"R0lGOD", b"UklGR", b"Qk", b"SUkq", b"TU0AK", b"AAAA")
"""How base64 text of the usual image formats begins."""
_BOM = b"\xef\xbb\xbf"
_HEAD = 4096
"""Bytes that are enough to tell what a text is."""
_PIECE = 1 << 16

_TAKEN_FOR_BASE64 = "the image was taken for base64 text, but"

_TEXT = re.compile(rb"[\t\r\n\x20-\x7e]*")
_QUOTES = re.compile(rb"""b?(["'])""")
_NOT_BASE64 = re.compile(rb"[^A-Za-z0-9+/=]")
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_PNM_HEAD = re.compile(rb"P[1-7fFy]\s")
_PATH = re.compile(rb"[/~]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\\\\|.*\.[A-Za-z][A-Za-z0-9]{1,4}$")


def resolve_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """Return the bytes of an image file, given them or their text: base64 or a ``data:`` URL, quoted or not.

    What comes back need not be an image.

    Raises:
        InvalidImageError: nothing was given, the text stands for no file, or the file is larger than the limit.
    """
    limits.check_length(data)
    if _is_text(data):
        data = _from_text(data)
    if len(data) > limits.max_bytes:
        raise limits.too_many_bytes(len(data))
    if not data:
        raise InvalidImageError("the image is empty: an encoded image file was expected, but zero bytes were given")
    return data


def _is_text(data: bytes) -> bool:
    """Whether the bytes are text, and not an image file: there is one format that may be text as well."""
    return _TEXT.fullmatch(data[:256].removeprefix(_BOM)) is not None and not _PNM_HEAD.match(data)


def _from_text(data: bytes) -> bytes:
    text = data.removeprefix(_BOM).strip()
    quotes = _QUOTES.match(text)
    if quotes and len(text) > quotes.end() and text.endswith(quotes[1]):
        text = text[quotes.end() : -1].strip()
    head = text[:_HEAD].partition(b",")[0].lower()
    if head.startswith(b"data:") or (len(head) < len(text[:_HEAD]) and head.rstrip().endswith(b"base64")):
        return _from_data_url(text)
    if text.startswith(_BASE64_HEADS):
        return _from_base64(text, _TAKEN_FOR_BASE64)
    if not text:
        return text
    if not kind_of(text):
        return _from_unknown_text(text)
    return text if quotes else data


def _from_unknown_text(text: bytes) -> bytes:
    """Base64 of a file that is known by its contents only."""
    plain = _plain(text)
    if not _NOT_BASE64.search(plain):
        try:
            file = _decoded(plain)
        except binascii.Error:
            file = b""
        _check_once(file, _TAKEN_FOR_BASE64)
        if kind_of(file):
            return file
    shown = text if len(text) <= 60 else text[:60] + b"..."
    path = _PATH.match(text[:_HEAD])
    cause = "; the server opens no files, so what the file holds must be sent in place of its path" if path else ""
    raise InvalidImageError(
        f"the image is in no known format: the text {shown.decode(errors='replace')!r} was given, and {EXPECTED}{cause}"
    )


def _from_data_url(url: bytes) -> bytes:
    head, comma, body = url.partition(b",")
    if not comma:
        raise InvalidImageError("the image is a data: URL without a comma, after which its contents were expected")
    body = _unquoted(body)
    is_base64 = head.rstrip().lower().endswith(b"base64") or b";base64;" in head.lower()
    if is_base64 or body.startswith(_BASE64_HEADS):
        return _from_base64(body, "the image is a data: URL of base64, but")
    return body


def _unquoted(text: bytes) -> bytes:
    """Decode percent-encoding piece by piece, because ``urllib`` makes an object of each escape in a piece."""
    pieces, start = [], 0
    while start < len(text):
        end = start + _PIECE
        cut = text.find(b"%", end - 2, end)  # an escape that the piece would split
        end = end if cut < 0 else cut
        pieces.append(urllib.parse.unquote_to_bytes(text[start:end]))
        start = end
    return b"".join(pieces)


def _from_base64(text: bytes, subject: str) -> bytes:
    plain = _plain(text)
    fault = _NOT_BASE64.search(plain)
    if fault:
        raise InvalidImageError(f"{subject} it holds {fault.group()!r}, which is no character of base64")
    if _has_spaces_for_plus(text):
        raise InvalidImageError(f"{subject} it holds spaces, probably for +, which a URL or a form needs as %2B")
    try:
        file = _decoded(plain)
    except binascii.Error as error:
        raise InvalidImageError(f"{subject} it is not valid base64: {one_line(error)}") from None
    _check_once(file, subject)
    return file


def _check_once(file: bytes, subject: str) -> None:
    if file[:5].lower() == b"data:" or (file.startswith(_BASE64_HEADS) and _is_text(file)):
        raise InvalidImageError(f"{subject} it was encoded in base64 twice, and once was expected")


def _plain(text: bytes) -> bytes:
    """Base64 text in the standard alphabet, without white space."""
    return text.translate(_URL_SAFE, b" \t\r\n\f\v")


def _has_spaces_for_plus(text: bytes) -> bool:
    """Whether spaces are part of the text and not between lines, which have a multiple of 4 characters each."""
    text = text.strip()
    lines = text[:_HEAD].split()
    return b" " in text and any(len(line) % 4 for line in lines[:-1])


def _decoded(plain: bytes) -> bytes:
    plain = plain.rstrip(b"=")
    return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)


# --- kinds of files --------------------------------------------------------------------------------------------------

_SPOILT = "binary file that was read as text"
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
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
    (b"\xff\xfe", "UTF-16 text"),
    (b"\x1a\x45\xdf\xa3", "Matroska or WebM video"),
    (b"\xef\xbf\xbd", _SPOILT),
    (b"\xc2\x89PNG", _SPOILT),
    (b"\xc3\xbf\xc3\x98", _SPOILT),
    (b"\\x", "text of a Python bytes literal"),
    (b"\\u", "text of a string literal"),
    (b"version https://git-lfs", "Git LFS pointer, whose file `git lfs pull` fetches"),
    (b"<svg", "SVG drawing"),
    (b"<", "HTML or XML file"),
    (b"{", "JSON text"),
    (b"[", "JSON text"),
)
"""What the first bytes of a file say that it is: a format by Pillow's name, or else. The first match counts."""

_BRANDS = (
    (frozenset({b"avif", b"avis"}), "AVIF"),
    (frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}), "HEIC"),
    (frozenset({b"mif1", b"mif2", b"msf1", b"miaf"}), "HEIC"),
    (frozenset({b"crx "}), "Canon raw image"),
)
"""Brands of files of the ISO base media format: the first set that has one of a file's brands counts."""

_URL = re.compile(rb"[a-z][a-z0-9+.-]{1,9}://")
_IMAGES = re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP", re.DOTALL)


def kind_of(data: bytes) -> str:
    """What the first bytes say that a file is: a format by Pillow's name (``HEIC`` besides), another kind, or ''."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        return _kind_of_media(data)
    if _PNM_HEAD.match(data):
        return "PPM"
    text = data[:64].removeprefix(_BOM).lstrip().lower()
    if _URL.match(text):
        return "URL; the image itself must be sent"
    known = next(
        (kind for magic, kind in _MAGIC if data.startswith(magic) or (magic.isascii() and text.startswith(magic))), ""
    )
    stray = _IMAGES.search(data[:32])
    return known or (f"picture after {stray.start()} other bytes" if stray else "")


def _kind_of_media(data: bytes) -> str:
    """The kind of a file of the ISO base media format, by its main brand and the compatible ones."""
    end = max(12, min(int.from_bytes(data[:4], "big"), 256))
    main, others = data[8:12], {data[start : start + 4] for start in range(16, end, 4)}
    for brands in ({main}, others) if main not in _BRANDS[2][0] else ({main, *others},):
        for known, kind in _BRANDS:
            if known & brands:
                return kind
    return "MP4 or QuickTime video"


def one_line(error: BaseException) -> str:
    """An exception's first line, as a part of a sentence."""
    text = str(error).strip().partition("\n")[0].rstrip(".")
    return text or type(error).__name__
