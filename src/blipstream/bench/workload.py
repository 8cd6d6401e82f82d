"""The requests: pictures like photographs, prompts and answers of lengths that vary, all drawn from one seed."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from blipstream.bench.load import Request
from blipstream.errors import InvalidRequestError

_WORDS = ("what", "where", "which", "how", "many", "is", "are", "the", "in", "on", "under", "colour", "dog")
_QUALITY = 85
_COARSE = (4, 12, 40)
"""Patches along the longer side of each layer of a picture, from its light to its texture."""
MOST_PIXELS = 100_000_000
MOST_TOKENS = 1_000_000


@dataclass(frozen=True)
class Lengths:
    """A normal distribution of whole numbers, 1 at least.

    Attributes:
        mean: its mean.
        spread: its standard deviation; 0 gives the mean each time.
    """

    mean: float
    spread: float = 0.0

    @classmethod
    def parse(cls, text: str, what: str) -> Lengths:
        """Read ``MEAN`` or ``MEAN:STD``.

        Raises:
            InvalidRequestError: it is something else.
        """
        mean, _, spread = text.partition(":")
        try:
            lengths = cls(float(mean), float(spread or 0))
        except ValueError:
            lengths = cls(0)
        if not (1 <= lengths.mean <= MOST_TOKENS and 0 <= lengths.spread <= MOST_TOKENS):
            raise InvalidRequestError(
                f"{what} must be MEAN or MEAN:STD, a mean of 1 to {MOST_TOKENS}, as in 10 or 10:3, but it is {text!r}"
            )
        return lengths

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """So many lengths."""
        return [max(1, round(length)) for length in rng.normal(self.mean, self.spread, count)]


@dataclass(frozen=True)
class Sizes:
    """Between which sizes pictures are, in pixels."""

    smallest: tuple[int, int]
    largest: tuple[int, int]

    @classmethod
    def parse(cls, text: str) -> Sizes:
        """Read ``WxH`` or ``WxH-WxH``.

        Raises:
            InvalidRequestError: it is something else, or has more than 100 million pixels.
        """
        found = re.fullmatch(r"(\d+)x(\d+)(?:-(\d+)x(\d+))?", text)
        numbers = [int(number) for number in found.groups() if number] if found else []
        sizes = cls((numbers[0], numbers[1]), (numbers[-2], numbers[-1])) if numbers else cls((0, 0), (0, 0))
        ordered = all(0 < low <= high for low, high in zip(sizes.smallest, sizes.largest, strict=True))
        if not ordered or sizes.largest[0] * sizes.largest[1] > MOST_PIXELS:
            raise InvalidRequestError(
                f"image sizes must be WIDTHxHEIGHT or SMALLEST-LARGEST, of at most {MOST_PIXELS} pixels, as in 640x480 "
                f"or 320x240-1920x1080, but they are {text!r}"
            )
        return sizes

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """One size: of one scale between the two, so that wide pictures stay wide."""
        scale = rng.random()
        width, height = (low + scale * (high - low) for low, high in zip(self.smallest, self.largest, strict=True))
        return max(1, round(width)), max(1, round(height))


@dataclass(frozen=True)
class Workload:
    """What is asked.

    Attributes:
        images: how many different ones there are; requests take turns at them.
        sizes: of the images.
        prompt_words: words of a prompt; None asks for captions.
        output_tokens: tokens of an answer.
        seed: of everything.
    """

    images: int
    sizes: Sizes
    prompt_words: Lengths | None
    output_tokens: Lengths
    seed: int

    def requests(self, count: int, part: int = 0) -> list[Request]:
        """So many requests; another ``part`` has other images and prompts."""
        rng = np.random.default_rng((self.seed, part))
        files = [render(rng, self.sizes.draw(rng)) for _ in range(min(self.images, count))]
        lengths = self.prompt_words.draw(rng, count) if self.prompt_words else [0] * count
        answers = self.output_tokens.draw(rng, count)
        return [
            Request(files[number % len(files)], _prompt(rng, words), tokens)
            for number, (words, tokens) in enumerate(zip(lengths, answers, strict=True))
        ]


def render(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    """A JPEG file of a picture with the light, shapes and grain of a photograph: layers of ever finer patches."""
    width, height = size
    picture = np.zeros((height, width, 3), np.float32)
    for patches in _COARSE:
        columns = max(2, patches * width // max(size))
        rows = max(2, patches * height // max(size))
        layer = Image.fromarray(rng.integers(0, 256, (rows, columns, 3), dtype=np.uint8))
        picture += np.asarray(layer.resize(size, Image.Resampling.BICUBIC), np.float32) / patches
    grain = rng.integers(0, 7, (height, width, 1), dtype=np.uint8)
    picture = picture / sum(1 / patches for patches in _COARSE) + grain
    file = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def _prompt(rng: np.random.Generator, words: int) -> str:
    chosen: Sequence[str] = rng.choice(_WORDS, words).tolist() if words else []
    return f"Question: {' '.join(chosen)}? Answer:" if chosen else ""
