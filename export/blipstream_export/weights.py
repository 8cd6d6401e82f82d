"""The weight files of a checkpoint: which there are, and whether each of them is whole.

A safetensors file is eight bytes of header length (little endian), a JSON header with the place of each tensor, and the
tensors. Its length follows from its header, so that a truncated file is found without reading it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blipstream.errors import CheckpointError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class TensorHeader:
    """One tensor, as its file's header describes it."""

    shape: tuple[int, ...]
    dtype: str
    file: Path
    start: int
    """Where its data begins in the file, in bytes."""
    num_bytes: int


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Check every weight file of a checkpoint, and return the tensors that they declare.

    Raises:
        CheckpointError: no weights, a missing or truncated file, a file that is no safetensors, or an index that
            names a tensor that its shard lacks.
    """
    if (folder / INDEX_FILE).is_file():
        return _read_shards(folder)
    if (folder / WEIGHTS_FILE).is_file():
        return read_header(folder / WEIGHTS_FILE)
    if any((folder / name).is_file() for name in _PICKLES):
        raise CheckpointError(
            f"the checkpoint {folder} holds its weights as {_PICKLES[0]}, and Blipstream reads safetensors: load and "
            "save it once with transformers to convert it"
        )
    raise CheckpointError(f"the checkpoint {folder} holds no weights: expected {WEIGHTS_FILE} or {INDEX_FILE}")


def _read_shards(folder: Path) -> dict[str, TensorHeader]:
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX_FILE} has no weight_map that says which shard holds each tensor")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not (folder / shard).is_file():
            raise CheckpointError(
                f"the checkpoint {folder} lacks the shard {shard}, one of {len(shards)} that its index names"
            )
    headers = {shard: read_header(folder / shard) for shard in shards}
    for tensor, shard in weight_map.items():
        if tensor not in headers[shard]:
            raise CheckpointError(f"the shard {folder / shard} lacks the tensor {tensor}, which the index places there")
    return {tensor: header for shard in shards for tensor, header in headers[shard].items()}


def read_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors of one safetensors file.

    Raises:
        CheckpointError: the file is truncated, or no safetensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTH_BYTES)
        if len(start) < _LENGTH_BYTES:
            raise CheckpointError(f"{path} is truncated: it holds {size} bytes, fewer than a safetensors header")
        (length,) = struct.unpack("<Q", start)
        if length > _MAX_HEADER_BYTES:
            raise CheckpointError(f"{path} is not a safetensors file: it declares a header of {length} bytes")
        header = file.read(length)
    if len(header) < length:
        raise CheckpointError(f"{path} is truncated: it ends within its header, after {size} bytes")
    tensors = _parse_header(path, header, _LENGTH_BYTES + length)
    expected = max((tensor.start + tensor.num_bytes for tensor in tensors.values()), default=_LENGTH_BYTES + length)
    if size != expected:
        fault = "truncated" if size < expected else "damaged"
        raise CheckpointError(f"{path} is {fault}: it holds {size} bytes, and its header declares {expected}")
    return tensors


def _parse_header(path: Path, header: bytes, data: int) -> dict[str, TensorHeader]:
    """The tensors, whose offsets count from ``data``."""
    try:
        entries: Mapping[str, Any] = json.loads(header)
        tensors = {}
        for name, entry in entries.items():
            if name != "__metadata__":
                start, end = (int(offset) for offset in entry["data_offsets"])
                shape = tuple(int(size) for size in entry["shape"])
                tensors[name] = TensorHeader(shape, str(entry["dtype"]), path, data + start, end - start)
        return tensors
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise CheckpointError(f"{path} is not a safetensors file: its header cannot be read") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: no such file, or its contents are not a JSON object.
    """
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"the checkpoint {path.parent} holds no {path.name}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} must hold a JSON object, but it holds a {type(contents).__name__}")
    return contents
