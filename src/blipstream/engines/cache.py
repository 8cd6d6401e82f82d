"""The KV cache: one key and one value tensor a layer, whose rows are the slots of the decode loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_ALIGNMENT = 64
"""Bytes of a cache line, and of the widest vector register."""


class KVCache:
    """Key and value tensors (S, H, T, D) of each layer: S rows of T tokens.

    The memory is reserved at once and filled by the operating system page by page, when a row is first written: unused
    rows and the unused end of each row cost nothing. An engine with memory of its own allocates a subclass that keeps
    the tensors there (:meth:`~blipstream.engines.base.Engine.allocate_cache`).
    """

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        num_heads: int,
        max_tokens: int,
        head_dim: int,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        shape, type_ = (num_rows, num_heads, max_tokens, head_dim), np.dtype(dtype)
        # key, value of layer 0, of layer 1, ...
        self.tensors = [_aligned_zeros(shape, type_) for _ in range(2 * num_layers)]

    def rows(self, first: int, count: int) -> list[npt.NDArray[Any]]:
        """Rows ``first .. first + count - 1`` of every tensor, as contiguous views (count, H, T, D)."""
        return [tensor[first : first + count] for tensor in self.tensors]

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of row ``source`` over row ``target``."""
        for tensor in self.tensors:
            tensor[target, :, :length] = tensor[source, :, :length]


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    memory = np.zeros(num_bytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).reshape(shape)
