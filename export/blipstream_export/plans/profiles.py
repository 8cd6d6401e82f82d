"""For which shapes an engine is built: TensorRT tunes its kernels for the optimum of each optimization profile.

Few profiles, and fixed sizes where that is possible: a single request is the common case and gets kernels of its own,
as does a decode step beside a prefill. A profile costs build time, and its own memory for each context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blipstream.manifest import DecoderSection, InstructionSection

Range = tuple[int, int, int]
"""Smallest, optimal and largest size of a free dimension."""

Profile = Mapping[str, Range]
"""The range of each free dimension of a graph, by its name."""

_TYPICAL_TEXT = 16
"""Tokens of a typical prompt or instruction, behind the soft tokens."""


def batches(largest: int) -> list[Range]:
    """One alone, and two or more with the largest batch as their optimum."""
    return [(1, 1, 1)] if largest == 1 else [(1, 1, 1), (2, largest, largest)]


def image_profiles(max_batch: int) -> list[Profile]:
    """Of the vision encoder, and of a Q-Former that reads no instruction."""
    return [{"batch": batch} for batch in batches(max_batch)]


def instructed_profiles(max_batch: int, instruction: InstructionSection) -> list[Profile]:
    """Of a Q-Former that reads an instruction."""
    length = _up_to(instruction.max_tokens, _TYPICAL_TEXT)
    return [{"batch": batch, "sequence": length} for batch in batches(max_batch)]


def prefill_profiles(sizes: DecoderSection, num_query_tokens: int, num_images: int) -> list[Profile]:
    """Of what reads whole prompts: a decoder in a prefill, or an encoder.

    Args:
        sizes: of the language model.
        num_query_tokens: soft tokens of one image.
        num_images: images of one prompt.
    """
    soft = num_query_tokens * num_images
    length = _up_to(sizes.max_prompt_tokens, soft + _TYPICAL_TEXT)
    return [
        {"batch": batch, "sequence": length, "num_soft_tokens": (1, batch[1] * soft, batch[2] * soft)}
        for batch in batches(sizes.max_sequences)
    ]


def step_profiles(sizes: DecoderSection) -> list[Profile]:
    """Of a decode step: one token a row, and no soft tokens (the graph wants one and does not look at it)."""
    one = (1, 1, 1)
    return [{"batch": batch, "sequence": one, "num_soft_tokens": one} for batch in batches(sizes.max_sequences)]


def shapes(profile: Profile, dims: Sequence[int | str]) -> tuple[tuple[int, ...], ...]:
    """Smallest, optimal and largest shape of a tensor with these dimensions; a name stands for a free one.

    Raises:
        KeyError: a free dimension that the profile does not have.
    """
    return tuple(tuple(profile[dim][i] if isinstance(dim, str) else dim for dim in dims) for i in range(3))


@dataclass(frozen=True)
class ServedShapes:
    """The profiles of each graph of a bundle.

    Args:
        max_batch: images, or instructions, that are read at once.
        num_query_tokens: soft tokens of one image.
        num_images: images of one prompt.
        instruction: what the Q-Former reads of an instruction, if it does.
        sizes: of the language model.
    """

    max_batch: int
    num_query_tokens: int
    num_images: int
    instruction: InstructionSection | None
    sizes: DecoderSection

    def vision_encoder(self) -> list[Profile]:
        """Of the vision encoder, which reads each frame of a video by itself."""
        return image_profiles(self.max_batch * self.num_images)

    def qformer(self) -> list[Profile]:
        """Of the Q-Former."""
        largest = self.max_batch * self.num_images
        if self.instruction is None:
            return image_profiles(largest)
        return instructed_profiles(largest, self.instruction)

    def decoder(self) -> list[Profile]:
        """Of the language model, or of its decoder: decode steps first, whose shapes a prefill may have as well."""
        if self.sizes.encoder is not None:
            return step_profiles(self.sizes)
        return [*step_profiles(self.sizes), *self.encoder()]

    def encoder(self) -> list[Profile]:
        """Of the language model's encoder."""
        return prefill_profiles(self.sizes, self.num_query_tokens, self.num_images)


def _up_to(largest: int, optimum: int) -> Range:
    return (1, min(optimum, largest), largest)
