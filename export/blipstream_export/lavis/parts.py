"""Keeping account of the tensors of LAVIS's files: which were used, which are missing, which were left over."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from blipstream.errors import CheckpointError

_GROUPS_SHOWN = 6
_NAMES_SHOWN = 3
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_NUMBERED = re.compile(r".*?\.\d+\.[^.]+")
"""The beginning of a layer's name, up to the component behind its number."""


@dataclass
class PartFile:
    """A file of tensors, and the names of those that were used."""

    path: Path
    tensors: dict[str, Tensor]
    used: set[str] = field(default_factory=set)

    @property
    def account(self) -> str:
        """How many tensors were used, and which were left over, in one phrase."""
        left_over = [name for name in self.tensors if name not in self.used]
        rest = f"{len(left_over)} left over ({grouped(left_over)})" if left_over else "none left over"
        return f"of {self.path.name}, {len(self.used)} tensors are used and {rest}"


class Part:
    """A part of the model, looked up in files one after the other: the first file that has a tensor counts.

    Tensors that are missing or of another shape than asked for are collected, so that :meth:`check` names all of them.

    Args:
        what: the part, in words.
        places: files, each with the prefix that this part's names have there.
    """

    def __init__(self, what: str, *places: tuple[PartFile, str]) -> None:
        self.what = what
        self._places = places
        self._missing: list[str] = []
        self._mismatched: list[str] = []

    @property
    def origin(self) -> str:
        """Where the part comes from, for messages."""
        return f"{self.what} of {' and '.join(dict.fromkeys(str(file.path) for file, _ in self._places))}"

    def names(self) -> set[str]:
        """The part's tensors in all files, without prefixes."""
        return {
            name.removeprefix(prefix)
            for file, prefix in self._places
            for name in file.tensors
            if name.startswith(prefix)
        }

    def count(self, prefix: str) -> int:
        """Number of layers: one more than the largest number that follows ``prefix`` in a name."""
        pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
        found = [int(match[1]) for name in self.names() if (match := pattern.match(name))]
        return max(found, default=-1) + 1

    def shape(self, name: str, meaning: str) -> tuple[int, ...]:
        """Shape of a tensor from which sizes are read; ``meaning`` names its dimensions, as in ``out, in``.

        Raises:
            CheckpointError: there is no such tensor, or it has another number of dimensions.
        """
        found = self._find(name)
        if found is None:
            raise CheckpointError(f"{self.origin} lacks the tensor {self._written(name)} ({meaning})")
        shape = tuple(found[0].tensors[found[1]].shape)
        if len(shape) != len(meaning.split(",")):
            raise CheckpointError(
                f"the tensor {found[1]} of {found[0].path} has shape {shape}, and ({meaning}) was expected"
            )
        return shape

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor for use, of any floating-point type; zeros that take no memory stand for one that is missing."""
        found = self._find(name)
        if found is None:
            self._missing.append(self._written(name))
            return torch.zeros(()).expand(shape)
        file, written = found
        tensor = file.tensors[written]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            kind = "" if tensor.is_floating_point() else f" of {tensor.dtype}"
            self._mismatched.append(
                f"the tensor {written} of {file.path} has shape {tuple(tensor.shape)}{kind}, and {shape} was expected"
            )
            return torch.zeros(()).expand(shape)
        file.used.add(written)
        return tensor

    def check(self) -> None:
        """Raise unless every tensor that was taken is there, in its shape.

        Raises:
            CheckpointError: the message names what is missing or differs.
        """
        if self._missing:
            raise CheckpointError(f"{self.origin} lacks {some(self._missing)}")
        if self._mismatched:
            more = f" (and {len(self._mismatched) - 1} more differ)" if len(self._mismatched) > 1 else ""
            raise CheckpointError(self._mismatched[0] + more)

    def _find(self, name: str) -> tuple[PartFile, str] | None:
        for file, prefix in self._places:
            if prefix + name in file.tensors:
                return file, prefix + name
        return None

    def _written(self, name: str) -> str:
        return self._places[-1][1] + name


def some(names: Sequence[str]) -> str:
    """The first names of many, with their number."""
    listed = ", ".join(names[:_NAMES_SHOWN]) + ", ..." * (len(names) > _NAMES_SHOWN)
    return f"the tensor {listed}" if len(names) == 1 else f"{len(names)} tensors ({listed})"


def grouped(names: Iterable[str]) -> str:
    """Names by what they belong to, each with how many it stands for; ``*`` stands for several layers' numbers."""
    groups: dict[str, Counter[str]] = {}
    for name in names:
        numbered = _NUMBERED.match(name)
        owner = numbered[0] if numbered else name.rpartition(".")[0] or name
        groups.setdefault(_NUMBER.sub("*", owner), Counter())[owner] += 1
    largest = sorted(groups.items(), key=lambda group: -group[1].total())
    shown = [
        f"{group if len(owners) > 1 else next(iter(owners))}: {owners.total()}"
        for group, owners in largest[:_GROUPS_SHOWN]
    ]
    rest = sum(owners.total() for _, owners in largest[_GROUPS_SHOWN:])
    return ", ".join(shown) + (f", others: {rest}" if rest else "")
