"""Memory of a device that NumPy cannot read, described as NumPy would describe it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """A contiguous array in the memory of a device.

    Args:
        address: of its first byte.
        shape: its sizes, the outermost dimension first.
        dtype: type of its elements; bf16, which NumPy lacks, is :data:`BFLOAT16`.
        owner: keeps the memory allocated for as long as this object lives.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: object

    @property
    def ndim(self) -> int:
        """How many dimensions it has."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, first: int, count: int) -> DeviceArray:
        """Entries ``first .. first + count - 1`` of the outermost dimension, in the same memory."""
        row_bytes = self.nbytes // self.shape[0]
        return replace(self, address=self.address + first * row_bytes, shape=(count, *self.shape[1:]))


Tensor: TypeAlias = "Array | DeviceArray"
"""What an engine reads and writes: an array on the host, or on its device."""

BFLOAT16 = np.dtype([("bfloat16", np.uint16)])
"""Stands for bf16 where a tensor stays on its device and only the size of its elements matters."""


def rows_of(tensor: Tensor, first: int, count: int) -> Tensor:
    """Entries ``first .. first + count - 1`` of the outermost dimension, in the same memory."""
    return tensor.rows(first, count) if isinstance(tensor, DeviceArray) else tensor[first : first + count]
