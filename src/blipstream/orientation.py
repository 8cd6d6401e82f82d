"""How a picture is turned upright: by the EXIF orientation, and by no other tag.

Pillow's ``exif_transpose`` writes the whole EXIF block anew, which fails when any tag of it is odd. The orientation is
read as Pillow reads it, from EXIF or else from XMP.
"""

from __future__ import annotations

from PIL import Image

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright(image: Image.Image, original: Image.Image | None = None) -> Image.Image:
    """Turn an image upright.

    Args:
        image: what is turned.
        original: whose EXIF says how, when it is not the image itself; EXIF that cannot be read says nothing.
    """
    turn = _TURNS.get(_orientation(image if original is None else original))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION)
    except Exception:  # on a block that is no EXIF, Pillow raises nearly every built-in exception
        return 1
    return value if isinstance(value, int) else 1
