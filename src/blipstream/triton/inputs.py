"""From the tensors of a ``blip2`` request to what is to be generated; every fault is named.

Names and shapes are those of :data:`blipstream.contract.BLIP2_INPUTS`. Triton has checked types and dimensions against
the model's configuration before these functions see a tensor; they check what it leaves open.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from blipstream.config import ServerConfig
from blipstream.decoding.request import SamplingParams
from blipstream.errors import InvalidRequestError
from blipstream.image_files import ImageLimits
from blipstream.instructions import InstructionEncoder
from blipstream.manifest import Manifest
from blipstream.triton.parameters import INPUT_NAMES, check_parameters, unknown_option

Array = npt.NDArray[Any]

MAX_WORD_BYTES = 1024
"""Of one stop word or bad word."""


@dataclass(frozen=True)
class ImageSource:
    """The image of a request: an encoded file, or pixels that the client preprocessed."""

    key: bytes
    """SHA-256 of what was sent; files and pixels never share one, nor do a file and its base64."""
    file: bytes | None = None
    """As it was sent: ``preprocess`` decodes base64, because that costs time."""
    pixels: npt.NDArray[np.float32] | None = None
    """(3, S, S)"""


@dataclass(frozen=True)
class ParsedRequest:
    """A request that is valid as far as its inputs tell."""

    images: tuple[ImageSource, ...]
    """A picture, or the frames of a video in their order."""
    text: str
    instruction: tuple[int, ...] | None
    """The text's ids for the Q-Former; None where it reads no instruction."""
    params: SamplingParams
    stream: bool
    echo: bool
    """Whether the answer is to begin with the request's text."""


class RequestParser:
    """Parses the inputs of requests to one bundle.

    Args:
        manifest: the bundle's image size and defaults of generation.
        config: limits on images and text.
        instructions: encodes a text for the Q-Former, where it reads one.
    """

    def __init__(
        self, manifest: Manifest, config: ServerConfig, instructions: InstructionEncoder | None = None
    ) -> None:
        self._instructions = instructions
        self._image_size = manifest.image.size
        self._num_frames = manifest.vision.num_frames
        self._generation = manifest.generation
        self._limits = ImageLimits(config.max_image_bytes, config.max_image_pixels)
        self._max_text_bytes = config.max_text_bytes
        self._max_words = config.max_words

    def parse(self, inputs: Mapping[str, Array], parameters: Mapping[str, Any]) -> ParsedRequest:
        """Check the inputs, by name and with their batch dimension of 1, and gather them.

        Args:
            inputs: the tensors.
            parameters: what came beside them; none of it changes the answer.

        Raises:
            InvalidRequestError: an input is malformed, contradicts another or asks for what is not served, or a
                parameter is unknown.
            PromptTooLongError: the text is longer than the Q-Former reads.
        """
        check_parameters(parameters)
        unknown = sorted(set(inputs) - INPUT_NAMES)
        if unknown:
            raise unknown_option(unknown[0])
        text = self._text("text_input", _scalar(inputs, "text_input"))
        return ParsedRequest(
            images=self._images(inputs),
            text=text,
            instruction=None if self._instructions is None else self._instructions.encode(text),
            params=self._params(inputs),
            stream=bool(_scalar(inputs, "stream")),
            echo=not _scalar(inputs, "exclude_input_in_output", default=True),
        )

    def _images(self, inputs: Mapping[str, Array]) -> tuple[ImageSource, ...]:
        files, pixels = inputs.get("image"), inputs.get("image_input")
        if files is not None and pixels is not None:
            raise InvalidRequestError("both image and image_input were given, and exactly one of them was expected")
        if files is not None:
            return self._files(files)
        if pixels is None:
            raise InvalidRequestError("neither image nor image_input was given, and exactly one of them was expected")
        return (self._pixels(pixels),)

    def _files(self, files: Array) -> tuple[ImageSource, ...]:
        if files.size != self._num_frames:
            expected = "one file" if self._num_frames == 1 else f"{self._num_frames} files, one for each frame"
            raise InvalidRequestError(f"image must hold {expected}, but it holds {files.size}")
        return tuple(self._file(_as_bytes(file)) for file in files.flat)

    def _file(self, file: bytes) -> ImageSource:
        self._limits.check_length(file)
        key = hashlib.sha256(b"file\0")
        key.update(file)
        return ImageSource(key.digest(), file=file)

    def _pixels(self, pixels: Array) -> ImageSource:
        if self._num_frames != 1:
            raise InvalidRequestError(
                f"image_input holds the pixels of one image, and this model reads {self._num_frames} frames: they were "
                "expected in image, as one file each"
            )
        expected = (1, 3, self._image_size, self._image_size)
        if pixels.shape != expected:
            raise InvalidRequestError(f"image_input must have the shape {expected}, but it has {pixels.shape}")
        if not np.isfinite(pixels).all():
            raise InvalidRequestError("image_input must hold finite numbers, but some are NaN or infinite")
        key = hashlib.sha256(b"pixels\0" + np.ascontiguousarray(pixels).tobytes()).digest()
        return ImageSource(key, pixels=pixels[0].astype(np.float32))

    def _params(self, inputs: Mapping[str, Array]) -> SamplingParams:
        _check_beams(inputs)
        seed = _scalar(inputs, "random_seed")
        return SamplingParams(
            max_tokens=_integer(inputs, "max_tokens", self._generation.max_new_tokens),
            min_tokens=_min_tokens(inputs),
            temperature=_optional_float(inputs, "temperature"),
            top_k=None if _scalar(inputs, "top_k") is None else _integer(inputs, "top_k", 0),
            top_p=_optional_float(inputs, "top_p"),
            repetition_penalty=_float(inputs, "repetition_penalty", self._generation.repetition_penalty),
            presence_penalty=_float(inputs, "presence_penalty", 0.0),
            frequency_penalty=_float(inputs, "frequency_penalty", 0.0),
            seed=None if seed is None else int(seed),
            stop=self._words(inputs, "stop_words"),
            bad_words=self._words(inputs, "bad_words"),
            log_probs=bool(_scalar(inputs, "return_log_probs")),
        )

    def _words(self, inputs: Mapping[str, Array], name: str) -> tuple[str, ...]:
        """The words of an input (1, n). A single empty string means none, as NVIDIA's clients send it."""
        words = [_as_bytes(word) for word in inputs[name].flat] if name in inputs else []
        if words == [b""]:
            return ()
        for limit, found, what in (
            (self._max_words, len(words), "strings"),
            (self._max_text_bytes, sum(map(len, words)), "bytes"),
            (MAX_WORD_BYTES, max(map(len, words), default=0), "bytes in one string"),
        ):
            if found > limit:
                raise InvalidRequestError(f"{name} must have at most {limit} {what}, but has {found}")
        return tuple(self._text(name, word) for word in words)

    def _text(self, name: str, value: Any) -> str:
        data = b"" if value is None else _as_bytes(value)
        if len(data) > self._max_text_bytes:
            raise InvalidRequestError(f"{name} must have at most {self._max_text_bytes} bytes, but has {len(data)}")
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidRequestError(
                f"{name} must be UTF-8 text, but its byte {error.start}, {data[error.start]:#04x}, is not"
            ) from None


def _check_beams(inputs: Mapping[str, Array]) -> None:
    """Beam search is not served. ``length_penalty`` ranks beams, so that with one it has nothing to do."""
    beams = _integer(inputs, "beam_width", 1)
    if beams != 1:
        raise InvalidRequestError(f"beam_width must be 1, for beam search is not served yet, but it is {beams}")
    penalty = _float(inputs, "length_penalty", 1.0)
    if not np.isfinite(penalty):
        raise InvalidRequestError(f"length_penalty must be a finite number, but it is {penalty}")


def _min_tokens(inputs: Mapping[str, Array]) -> int:
    """``min_tokens``, or its older name ``min_length``."""
    newer, older = (_scalar(inputs, name) for name in ("min_tokens", "min_length"))
    if newer is not None and older is not None and newer != older:
        raise InvalidRequestError(
            f"min_tokens and min_length mean the same, but min_tokens is {newer} and min_length is {older}"
        )
    return int(newer if newer is not None else older if older is not None else 0)


def _scalar(inputs: Mapping[str, Array], name: str, default: Any = None) -> Any:
    """The one element of an input (1, 1), or the default when it was not given."""
    if name not in inputs:
        return default
    array = inputs[name]
    if array.size != 1:
        raise InvalidRequestError(f"{name} must hold one element, but its shape is {array.shape}")
    return array.flat[0]


def _integer(inputs: Mapping[str, Array], name: str, default: int) -> int:
    value = _scalar(inputs, name)
    return default if value is None else int(value)


def _float(inputs: Mapping[str, Array], name: str, default: float) -> float:
    value = _scalar(inputs, name)
    return default if value is None else float(value)


def _optional_float(inputs: Mapping[str, Array], name: str) -> float | None:
    value = _scalar(inputs, name)
    return None if value is None else float(value)


def _as_bytes(value: Any) -> bytes:
    return value.encode("utf-8") if isinstance(value, str) else bytes(value)
