"""The KV cache: one key and one value tensor a layer, whose rows are the slots of the decode loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from blipstream.engines.memory import Array, Tensor

_ALIGNMENT = 64
"""Bytes of a cache line, and of the widest vector register."""


@dataclass(frozen=True)
class CacheShape:
    """Sizes of a KV cache."""

    num_layers: int
    """With a key and a value tensor each."""
    num_rows: int
    num_heads: int
    max_tokens: int
    head_dim: int

    @property
    def tensor(self) -> tuple[int, int, int, int]:
        """Shape (S, H, T, D) of each key and value tensor."""
        return (self.num_rows, self.num_heads, self.max_tokens, self.head_dim)


class KVCache(ABC):
    """Key and value tensors (S, H, T, D) of each layer: S rows of T tokens."""

    @abstractmethod
    def rows(self, first: int, count: int) -> Sequence[Tensor]:
        """Rows ``first .. first + count - 1`` of every tensor, as contiguous views (count, H, T, D).

        In the order key, value of layer 0, of layer 1, ...
        """

    @abstractmethod
    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of row ``source`` over row ``target``."""

    @abstractmethod
    def write(self, first: int, tensors: Sequence[Tensor]) -> None:
        """Copy a tensor (B, H, L, D) for each of :meth:`rows` to the beginning of rows ``first .. first + B - 1``."""


class HostKVCache(KVCache):
    """A KV cache in the host's memory.

    The memory is reserved at once and filled by the operating system page by page, when a row is first written: unused
    rows and the unused end of each row cost nothing.
    """

    def __init__(self, shape: CacheShape, dtype: npt.DTypeLike = np.float32) -> None:
        self.tensors = [_aligned_zeros(shape.tensor, np.dtype(dtype)) for _ in range(2 * shape.num_layers)]

    def rows(self, first: int, count: int) -> list[Array]:
        """See :meth:`KVCache.rows`."""
        return [tensor[first : first + count] for tensor in self.tensors]

    def read(self, row: int, length: int) -> Array:
        """A copy (2 * layers, H, length, D) of the first ``length`` tokens of a row, in the order of :meth:`rows`."""
        return np.stack([tensor[row, :, :length] for tensor in self.tensors])

    def move_row(self, source: int, target: int, length: int) -> None:
        """See :meth:`KVCache.move_row`."""
        for tensor in self.tensors:
            tensor[target, :, :length] = tensor[source, :, :length]

    def write(self, first: int, tensors: Sequence[Tensor]) -> None:
        """See :meth:`KVCache.write`; the tensors are the host's too."""
        for rows, written in zip(self.rows(first, tensors[0].shape[0]), tensors, strict=True):
            rows[:, :, : written.shape[2]] = written


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    memory = np.zeros(num_bytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).reshape(shape)
