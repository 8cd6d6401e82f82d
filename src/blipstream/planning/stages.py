"""How long the stages of a bundle take on a machine, as the simulator needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, PositiveInt, TypeAdapter, ValidationError

from blipstream.errors import InvalidRequestError


def _increasing(curve: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    amounts = [amount for amount, _ in curve]
    if not amounts or amounts != sorted(set(amounts)):
        raise ValueError("amounts must increase")
    return curve


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Curve = Annotated[Sequence[tuple[Positive, Positive]], AfterValidator(_increasing)]
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
        max_prompt_tokens: soft tokens and question.
        max_tokens: soft tokens, question and answer; with ``answer_apart``, of the answer and the token before it.
        answer_apart: whether an encoder keeps the prompt.
        fastest: time of the fastest rounds, over all stages, as a part of the medians'.
        slowest: the same of the slowest ones.
        others: cores that other programs kept busy meanwhile.
    """

    images: Curve
    prefill: Curve
    step: Curve
    overlap: Positive
    max_images: PositiveInt
    max_sequences: PositiveInt
    prefill_budget: PositiveInt
    image_tokens: PositiveInt
    max_prompt_tokens: PositiveInt
    max_tokens: PositiveInt
    answer_apart: bool
    fastest: Positive
    slowest: Positive
    others: Annotated[float, Field(ge=0, allow_inf_nan=False)]

    def room_after(self, prompt_tokens: int) -> int:
        """Tokens of an answer for which there is room; 0 when the prompt is too long."""
        if prompt_tokens > self.max_prompt_tokens:
            return 0
        return self.max_tokens - (1 if self.answer_apart else prompt_tokens)

    def scaled(self, factor: float) -> StageTimes:
        """Of a machine on which everything takes ``factor`` times as long."""
        images, prefill, step = (
            [(amount, factor * seconds) for amount, seconds in curve]
            for curve in (self.images, self.prefill, self.step)
        )
        return replace(self, images=images, prefill=prefill, step=step)

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
        path.write_bytes(TypeAdapter(StageTimes).dump_json(self, indent=2) + b"\n")

    @classmethod
    def load(cls, path: Path) -> StageTimes:
        """Read what :meth:`save` wrote.

        Raises:
            InvalidRequestError: it is something else.
        """
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except OSError as error:
            raise InvalidRequestError(f"{path} cannot be read: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise InvalidRequestError(
                f"{path} does not hold the times of a bundle's stages: {where}: {first['msg']}"
            ) from error


def interpolate(curve: Curve, amount: float) -> float:
    """Between two points on the line through them; below the first as it; beyond the last in its last direction."""
    if len(curve) == 1:
        return curve[0][1]
    last = len(curve) - 1
    right = next((index for index in range(1, last) if amount <= curve[index][0]), last)
    (x0, y0), (x1, y1) = curve[right - 1], curve[right]
    return y0 + (max(amount, x0) - x0) * (y1 - y0) / (x1 - x0)
