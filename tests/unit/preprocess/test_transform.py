"""Pixels: the transform against transformers' image processor, in its Pillow form."""

from __future__ import annotations

import io
import logging

import numpy as np
import pytest
from PIL import Image, ImageOps

from blipstream import preprocess
from blipstream.manifest import ImageSection
from blipstream.preprocess import ImageTransform, decode_image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def section(size: int = 28, resample: str = "bicubic") -> ImageSection:
    return ImageSection(size=size, mean=CLIP_MEAN, std=CLIP_STD, resample=resample, rescale_factor=1 / 255)


def reference(image: Image.Image, size: int = 28, resample: str = "bicubic") -> np.ndarray:
    """(3, S, S), as transformers computes it without torchvision."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    pil = pytest.importorskip("transformers.models.blip.image_processing_pil_blip")
    processor = pil.BlipImageProcessorPil(
        size={"height": size, "width": size},
        resample=Image.Resampling[resample.upper()],
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )
    return processor(image, return_tensors="np").pixel_values[0]


def random_image(mode: str, size: tuple[int, int], seed: int = 0) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0], channels) if channels > 1 else (size[1], size[0])
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.frombytes(mode, size, pixels.tobytes())


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [28, 53, 224, 364])
@pytest.mark.parametrize("source", [(64, 48), (28, 28), (7, 501), (640, 427), (1, 1)])
def test_rgb_equals_transformers_bit_for_bit(size: int, source: tuple[int, int]) -> None:
    image = random_image("RGB", source)
    pixels = ImageTransform(section(size)).decode(encoded(image))
    assert pixels.dtype == np.float32
    assert pixels.shape == (3, size, size)
    np.testing.assert_array_equal(pixels, reference(image, size))


@pytest.mark.parametrize("resample", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_every_filter_equals_transformers(resample: str) -> None:
    image = random_image("RGB", (61, 40))
    np.testing.assert_array_equal(
        ImageTransform(section(resample=resample))(image), reference(image, resample=resample)
    )


@pytest.mark.parametrize("band", [1, 120, 1 << 20])
@pytest.mark.parametrize("mode", ["L", "LA", "RGBA"])
def test_modes_of_png_equal_transformers(mode: str, band: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "_BAND_PIXELS", band)
    image = random_image(mode, (50, 33))
    np.testing.assert_array_equal(ImageTransform(section()).decode(encoded(image)), reference(image))


def test_one_bit_image_equals_transformers() -> None:
    image = random_image("L", (50, 33)).convert("1")
    np.testing.assert_array_equal(ImageTransform(section()).decode(encoded(image)), reference(image))


def test_cmyk_jpeg_equals_transformers() -> None:
    data = encoded(random_image("CMYK", (50, 33)), "JPEG", quality=90)
    stored = Image.open(io.BytesIO(data))
    assert stored.mode == "CMYK"
    np.testing.assert_array_equal(ImageTransform(section()).decode(data), reference(stored))


@pytest.mark.parametrize("transparency", [3, bytes(range(0, 240, 30))])
def test_palette_with_alpha_equals_transformers(transparency: int | bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """One transparent palette entry, or an alpha for each: both lie over white."""
    monkeypatch.setattr(preprocess, "_BAND_PIXELS", 120)
    image = random_image("RGB", (50, 33)).quantize(8)
    data = encoded(image, transparency=transparency)
    stored = Image.open(io.BytesIO(data))
    assert stored.mode == "P"
    np.testing.assert_array_equal(ImageTransform(section()).decode(data), reference(stored))


def test_transparent_pixels_are_white() -> None:
    clear = Image.new("RGBA", (8, 8), (10, 200, 30, 0))
    assert decode_image(encoded(clear)).getpixel((4, 4)) == (255, 255, 255)


def test_rgb_with_a_transparent_colour_lies_over_white() -> None:
    data = encoded(Image.new("RGB", (8, 8), (1, 2, 3)), transparency=(1, 2, 3))
    assert decode_image(data).getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(random_image("RGB", (40, 30)), "JPEG", exif=exif)
    stored = Image.open(io.BytesIO(data))
    upright = decode_image(data)
    assert upright.size == ((40, 30) if orientation < 5 else (30, 40))
    expected = ImageOps.exif_transpose(stored).convert("RGB")  # as transformers.image_utils.load_image
    np.testing.assert_array_equal(np.asarray(upright), np.asarray(expected))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(file_format: str) -> None:
    levels = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    image = decode_image(encoded(Image.fromarray(levels), file_format))
    expected = np.round(levels / 65535 * 255)
    assert np.abs(np.asarray(image)[:, :, 0] - expected).max() <= 0.5
    assert len(np.unique(np.asarray(image))) == 256


def test_sixteen_bit_grey_with_exif_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    levels = np.arange(40 * 30, dtype=np.uint16).reshape(30, 40) * 50
    assert decode_image(encoded(Image.fromarray(levels), exif=exif)).size == (30, 40)


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animation_gives_its_first_frame(file_format: str) -> None:
    frames = [Image.new("RGB", (24, 24), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:])
    assert decode_image(data).getpixel((12, 12)) == pytest.approx((255, 0, 0), abs=3)


@pytest.mark.parametrize("source", [(1, 10_000), (10_000, 1)])
def test_strips(source: tuple[int, int]) -> None:
    image = random_image("RGB", source)
    np.testing.assert_array_equal(ImageTransform(section()).decode(encoded(image)), reference(image))


def photograph(size: tuple[int, int]) -> Image.Image:
    """Soft shapes with some grain."""
    layers = random_image("RGB", (7, 5)).resize(size, Image.Resampling.BICUBIC)
    return Image.blend(layers, random_image("RGB", size, seed=1), 0.05)


@pytest.mark.parametrize(("mode", "orientation"), [("RGB", 1), ("RGB", 6), ("L", 1), ("CMYK", 1)])
@pytest.mark.parametrize(("oversampling", "decoded"), [(1, (300, 225)), (2, (600, 450)), (4, (1200, 900))])
def test_large_jpegs_may_be_decoded_at_a_reduced_size(
    mode: str, orientation: int, oversampling: int, decoded: tuple[int, int]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(photograph((2400, 1800)).convert(mode), "JPEG", exif=exif, quality=90)
    assert decode_image(file, reduced_to=oversampling * 224).size == (decoded if orientation == 1 else decoded[::-1])
    exact, reduced = (ImageTransform(section(224), times).decode(file) for times in (0, oversampling))
    levels = np.abs(reduced - exact) * np.array(CLIP_STD)[:, None, None] * 255
    assert 0 < levels.mean() < (2 if oversampling == 1 else 0.5)


@pytest.mark.parametrize(("file_format", "size"), [("PNG", (1200, 900)), ("WEBP", (1200, 900)), ("JPEG", (880, 600))])
def test_other_files_and_small_ones_are_decoded_whole(file_format: str, size: tuple[int, int]) -> None:
    file = encoded(photograph(size), file_format)
    exact, same = (ImageTransform(section(224), times).decode(file) for times in (0, 2))
    np.testing.assert_array_equal(same, exact)
