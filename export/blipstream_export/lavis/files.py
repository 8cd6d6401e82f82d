"""Reading ``.pth`` files: tensors by name, mapped from disk, and nothing that would run code."""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from blipstream.errors import CheckpointError
from blipstream_export.files import check_readable

_UNSUPPORTED = re.compile(r"GLOBAL (\S+)")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that ``torch.save`` wrote: a dictionary of them, or one whose entry ``model`` is that.

    Values that are no tensors are left out. Files in the zip format (any since torch 1.6) are mapped: their tensors
    take memory when they are read.

    Raises:
        CheckpointError: no such file, not a file of tensors, or a pickle that needs code to be read.
    """
    if not path.is_file():
        found = "is not a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {found}, and a .pth file of tensors was expected there")
    check_readable(path)
    contents = _load(path)
    if isinstance(contents, dict) and isinstance(contents.get("model"), dict):
        contents = contents["model"]
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} holds a {type(contents).__name__}, and a dictionary of tensors was expected")
    tensors = {name: value for name, value in contents.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        keys = ", ".join(map(str, list(contents)[:3])) or "nothing"
        raise CheckpointError(f"{path} holds no tensors by name, neither at its top nor under 'model' (it has: {keys})")
    return tensors


def _load(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a remark on TorchScript archives, which are refused below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except MemoryError:
        raise
    except Exception as error:  # on foreign files torch.load raises nearly every built-in exception
        raise _refusal(path, error) from error


def _refusal(path: Path, error: Exception) -> CheckpointError:
    text = str(error)
    named = _UNSUPPORTED.search(text)
    if isinstance(error, UnpicklingError) and named:
        return CheckpointError(
            f"{path} is a pickle that needs code to be read ({named[1]}), and Blipstream reads tensors alone: save its "
            "state_dict by itself"
        )
    if "TorchScript" in text:
        return CheckpointError(
            f"{path} is a TorchScript archive, which holds code, and a .pth file of tensors was expected"
        )
    return CheckpointError(f"{path} is not a .pth file of tensors as torch.save writes it, or it is damaged")
