"""What an operator may set of a server, declared once.

The launcher hands a :class:`ServerConfig` to the Triton models by environment variables, one a field
(``BLIPSTREAM_QUEUE_SIZE``, ...), so that a container that starts ``tritonserver`` itself can set the same.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from blipstream.errors import ServerStartError

PREFIX = "BLIPSTREAM_"
"""Begins the name of each environment variable."""


@dataclass(frozen=True)
class ServerConfig:
    """Settings of the Triton models of one server.

    Raises:
        ServerStartError: a value is out of its range; the message names it.
    """

    threads: int = 0
    """CPU threads of each engine (vision encoder, Q-Former, decoder); 0 means all cores of the process."""
    queue_size: int = 256
    """Requests that may wait, for image features or for a slot; further ones are refused as busy."""
    request_timeout: float = 60.0
    """Seconds that a request may wait for its slot when it does not say itself; 0 means for ever."""
    prefill_budget: int = 512
    """Prompt tokens that are prefilled between two decode steps at most, unless a single prompt is longer."""
    decode_niceness: int = 0
    """Added to the niceness of the decode loop's process: on a CPU, images are then read before tokens are decoded."""
    cache_bytes: int = 256 << 20
    """Bytes of image features that are kept; 0 keeps none."""
    prefix_bytes: int = 256 << 20
    """Bytes of images' keys and values that the decoder keeps, for further questions about them; 0 keeps none."""
    max_image_bytes: int = 64 << 20
    """Bytes of an encoded image at most."""
    max_image_pixels: int = 64_000_000
    """Pixels of an image at most, known from its header; a JPEG file of up to four times as many is decoded reduced."""
    max_image_seconds: float = 10.0
    """CPU seconds that decoding an image may take."""
    jpeg_oversampling: int = 0
    """Large JPEG files are decoded at a reduced size, so many times that of the model's image at least; 0: whole."""
    max_text_bytes: int = 64 << 10
    """Bytes of a prompt, and of all stop words or bad words together, at most."""
    max_words: int = 1000
    """Stop words of a request, and bad words, at most."""
    stop_grace: float = 2.0
    """Seconds that running sequences have to end when the server stops."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            lowest = _LOWEST.get(field.name, 0)
            if not (value >= lowest and math.isfinite(value)):
                raise ServerStartError(f"{field.name} must be at least {lowest}, but it is {value}")

    def to_environment(self) -> dict[str, str]:
        """The settings as environment variables."""
        return {f"{PREFIX}{name.upper()}": str(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> ServerConfig:
        """Read the settings from environment variables; those that are not set have their defaults.

        Raises:
            ServerStartError: a variable is no number or out of its range.
        """
        variables = os.environ if environment is None else environment
        values: dict[str, int | float] = {}
        for field in dataclasses.fields(cls):
            name = f"{PREFIX}{field.name.upper()}"
            if name in variables:
                values[field.name] = _number(name, variables[name], type(field.default))
        return cls(**values)  # type: ignore[arg-type]  # the types are those of the defaults


_LOWEST = {
    "queue_size": 1,
    "prefill_budget": 1,
    "max_image_bytes": 1,
    "max_image_pixels": 1,
    "max_image_seconds": 0.01,
    "max_text_bytes": 1,
}


def _number(name: str, text: str, kind: type) -> int | float:
    try:
        return int(text) if kind is int else float(text)
    except ValueError:
        expected = "an integer" if kind is int else "a number"
        raise ServerStartError(f"{name} must be {expected}, but it is {text!r}") from None
