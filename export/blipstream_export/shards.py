"""The tensors of a checkpoint's safetensors files, read one by one when they are needed.

A tensor is read into memory of its own, not mapped: what is dropped is free again, and a process holds no more of a
checkpoint than it works on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blipstream.errors import CheckpointError
from blipstream_export.deferred import Deferred, deferred
from blipstream_export.weights import TensorHeader, read_headers, weight_files

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The types of safetensors that a model of this family may have."""


def deferred_tensors(folder: Path) -> dict[str, Deferred]:
    """Every tensor of a checkpoint, by its name in the files.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is of a type that no model has.
    """
    return {name: _defer(name, header) for name, header in read_headers(folder).items()}


def mapped_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by its name in the files; mapped from disk.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    from safetensors.torch import load_file

    headers = read_headers(folder)
    loaded = {path: load_file(path) for path in weight_files(folder)}
    return {name: loaded[header.file][name] for name, header in headers.items()}


def read_tensor(header: TensorHeader) -> Tensor:
    """One tensor, in memory of its own."""
    count = header.num_bytes
    data = np.fromfile(header.file, np.uint8, count=count, offset=header.start)
    if len(data) != count:
        raise CheckpointError(f"{header.file} was truncated while it was read")
    if count == 0:
        return torch.empty(header.shape, dtype=_TYPES[header.dtype])
    return torch.from_numpy(data).view(_TYPES[header.dtype]).reshape(header.shape)


def _defer(name: str, header: TensorHeader) -> Deferred:
    if header.dtype not in _TYPES:
        raise CheckpointError(
            f"the tensor {name} in {header.file} is of type {header.dtype}: expected one of {', '.join(_TYPES)}"
        )
    return deferred(header.shape, _TYPES[header.dtype], lambda: read_tensor(header))


def weight_bytes(headers: Mapping[str, TensorHeader]) -> int:
    """Bytes that all tensors take in their files."""
    return sum(header.num_bytes for header in headers.values())
