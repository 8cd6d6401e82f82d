"""The weight files of a checkpoint: which there are, and whether each of them is whole.

A safetensors file is eight bytes of header length (little endian), a JSON header with the place of each tensor, and the
tensors. Its length follows from its header, so a truncated file is found without reading it.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blipstream.errors import CheckpointError
from blipstream_export.files import check_readable, read_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
_FOREIGN = (".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")
"""Ends of the names of weights in other formats."""
_OF_TRAINING = ("training_args.", "optimizer.", "scheduler.", "scaler.", "rng_state")
"""What a training leaves beside the weights, in the same formats."""
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
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
    found = {path: read_header(path) for path in weight_files(folder)}
    if not (folder / WEIGHTS_FILE).is_file() and (folder / INDEX_FILE).is_file():
        return _as_indexed(folder / INDEX_FILE, found)
    headers: dict[str, TensorHeader] = {}
    for path, tensors in found.items():
        if twice := sorted(headers.keys() & tensors.keys()):
            raise CheckpointError(
                f"{headers[twice[0]].file.name} and {path.name} of {folder} both hold the tensor {twice[0]}, and no "
                f"{INDEX_FILE} says which one counts"
            )
        headers |= tensors
    return headers


def _as_indexed(index: Path, found: Mapping[Path, Mapping[str, TensorHeader]]) -> dict[str, TensorHeader]:
    """Each tensor from the shard where the index places it; tensors that it does not name count as well."""
    headers = {name: header for tensors in found.values() for name, header in tensors.items()}
    for tensor, shard in _weight_map(index).items():
        path = index.parent / shard
        if tensor not in found[path]:
            raise CheckpointError(f"the shard {path} lacks the tensor {tensor}, which the index places there")
        headers[tensor] = found[path][tensor]
    return headers


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a checkpoint: one, as transformers prefers it, or all shards.

    Shards come from the index, or from their names where there is no index.

    Raises:
        CheckpointError: no weights, or a missing shard.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if (folder / INDEX_FILE).is_file():
        return indexed_files(folder / INDEX_FILE)
    found = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if (folder / ADAPTER_FILE).is_file():
        raise CheckpointError(adapter_fault(folder))
    if numbered := [match for path in found if (match := _NUMBERED.fullmatch(path.name))]:
        return _numbered_files(folder, numbered)
    if len(found) == 1:
        return found
    raise CheckpointError(_no_weights(folder, [path.name for path in found]))


def indexed_files(index: Path) -> list[Path]:
    """The shards that an index names.

    Raises:
        CheckpointError: the index names none, or one that is not there.
    """
    shards = sorted(set(_weight_map(index).values()))
    for shard in shards:
        if not (index.parent / shard).is_file():
            raise CheckpointError(
                f"the checkpoint {index.parent} lacks the shard {shard}, one of {len(shards)} that its index names"
            )
    return [index.parent / shard for shard in shards]


def weight_notes(folder: Path) -> tuple[str, ...]:
    """One sentence on an index that is not read, or is missing; none as a rule."""
    whole, indexed = (folder / WEIGHTS_FILE).is_file(), (folder / INDEX_FILE).is_file()
    if whole and indexed:
        return (f"the weights are those of {WEIGHTS_FILE}: {INDEX_FILE} beside it is not read, as in transformers",)
    if whole or indexed:
        return ()
    return (f"there is neither {WEIGHTS_FILE} nor {INDEX_FILE}: the weights were found by the names of the files",)


def _weight_map(index: Path) -> Mapping[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(x, str) for x in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map that says which shard holds each tensor")
    return weight_map


def _numbered_files(folder: Path, found: Sequence[re.Match[str]]) -> list[Path]:
    """Shards whose names count them, all of one series."""
    series = {(match[1], int(match[3])) for match in found}
    if len(series) > 1:
        listed = ", ".join(f"{stem}-*-of-{count:05}" for stem, count in sorted(series))
        raise CheckpointError(
            f"{folder} holds several series of shards ({listed}) and no {INDEX_FILE} that says which one counts"
        )
    ((stem, count),) = series
    names = [f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"the checkpoint {folder} lacks the shard {name}, and the index {INDEX_FILE}")
    return [folder / name for name in names]


def _no_weights(folder: Path, safetensors: Sequence[str]) -> str:
    expected = f"expected {WEIGHTS_FILE} or {INDEX_FILE}"
    if safetensors:
        return f"the checkpoint {folder} holds several weight files ({', '.join(safetensors[:3])}): {expected}"
    for path in folder.glob("*.safetensors"):
        if path.is_symlink():
            return f"{path} is a link to a file that is not there: its download was not finished, or was removed"
    others = sorted(path.name for path in folder.iterdir())
    return foreign_weights(str(folder), others) or f"the checkpoint {folder} holds no weights: {expected}"


def adapter_fault(folder: Path) -> str:
    """What is to be said of an adapter in place of a checkpoint."""
    return (
        f"{folder} holds an adapter ({ADAPTER_FILE}), and a whole checkpoint was expected: merge it into its base "
        "model with merge_and_unload of peft, and save that"
    )


def foreign_weights(source: str, names: Iterable[str]) -> str | None:
    """What is to be said of weights in another format, if some of these files are such."""
    for name in names:
        if name.endswith(_FOREIGN) and not name.startswith(_OF_TRAINING):
            return (
                f"the checkpoint {source} holds its weights as {name}, and Blipstream reads safetensors: load and save "
                "it once with transformers to convert it"
            )
    return None


def read_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors of one safetensors file.

    Raises:
        CheckpointError: the file is truncated, or no safetensors.
    """
    check_readable(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTH_BYTES)
        if len(start) < _LENGTH_BYTES:
            raise CheckpointError(f"{path} is truncated: it holds {size} bytes, fewer than a safetensors header")
        (length,) = struct.unpack("<Q", start)
        if length > _MAX_HEADER_BYTES:
            raise CheckpointError(f"{path} is not a safetensors file: it begins with {start!r}")
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
