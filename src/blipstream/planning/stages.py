"""How long the stages of a bundle take on a machine, as the simulator needs them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blipstream.errors import InvalidRequestError

Curve = Sequence[tuple[float, float]]
"""(amount, seconds) at increasing amounts."""


@dataclass(frozen=True)
class StageTimes:
    """Times in seconds, on a machine with nothing else to do.

    Attributes:
        images: of ViT and Q-Former, by images in a batch.
        prefill: of a prefill, by its tokens, padding included.
        step: of a decode step, by its rows.
        overlap: how much of the machine's work is left when an image model and the decoder compute at the same time:
            1 where they do not get in each other's way.
        max_images: in a batch.
        max_sequences: rows of the KV cache.
        prefill_budget: tokens that one iteration of the decode loop prefills at most, unless a prompt is longer.
        image_tokens: soft tokens of an image.
    """

    images: Curve
    prefill: Curve
    step: Curve
    overlap: float
    max_images: int
    max_sequences: int
    prefill_budget: int
    image_tokens: int

    def images_s(self, count: int) -> float:
        """Seconds of a batch of images."""
        return interpolate(self.images, count)

    def prefill_s(self, tokens: int) -> float:
        """Seconds of a prefill."""
        return interpolate(self.prefill, tokens)

    def step_s(self, rows: int) -> float:
        """Seconds of a decode step."""
        return interpolate(self.step, rows)

    def save(self, path: Path) -> None:
        """Write them as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> StageTimes:
        """Read what :meth:`save` wrote.

        Raises:
            InvalidRequestError: it is something else.
        """
        try:
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            curves = {name: [(float(x), float(y)) for x, y in data[name]] for name in ("images", "prefill", "step")}
            return cls(**{**data, **curves})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidRequestError(f"{path} does not hold the times of a bundle's stages: {error!r}") from error


def interpolate(curve: Curve, amount: float) -> float:
    """Between two points on the line through them; below the first as it; beyond the last in its last direction."""
    if len(curve) == 1:
        return curve[0][1]
    last = len(curve) - 1
    right = next((index for index in range(1, last) if amount <= curve[index][0]), last)
    (x0, y0), (x1, y1) = curve[right - 1], curve[right]
    return y0 + (max(amount, x0) - x0) * (y1 - y0) / (x1 - x0)
