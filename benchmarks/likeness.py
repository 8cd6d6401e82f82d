"""Whether two systems say the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def agreement(ours: Sequence[tuple[int, ...]], theirs: Sequence[tuple[int, ...]]) -> float:
    """Share of the tokens that are the same, up to the first that differs in each answer."""
    same = total = 0
    for a, b in zip(ours, theirs, strict=True):
        total += len(b)
        same += next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), len(b))
    return same / total


def likeness(outputs: Sequence[Any], reference: Sequence[Any]) -> float:
    """Of rounds of arrays the least cosine; of rounds of answers, each a list of tokens, their :func:`agreement`."""
    if isinstance(outputs[0], np.ndarray):
        return min(_cosine(own.ravel(), other.ravel()) for own, other in zip(outputs, reference, strict=True))
    ours, theirs = ([tuple(ids) for tokens in side for ids in tokens] for side in (outputs, reference))
    return agreement(ours, theirs)


def _cosine(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
