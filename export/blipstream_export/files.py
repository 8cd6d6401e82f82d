"""Files of a checkpoint as people have them: pointers in place of files, and JSON."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from pathlib import Path
from typing import Any

from blipstream.errors import CheckpointError

_LFS = b"version https://git-lfs.github.com/spec/"


def check_readable(path: Path) -> None:
    """Refuse a Git LFS pointer, which a clone without Git LFS has in place of each large file, and JSON after a mark.

    Raises:
        CheckpointError: ``path`` is a pointer, or begins with a byte order mark, with which transformers reads no file.
    """
    with path.open("rb") as file:
        start = file.read(len(_LFS))
    if start == _LFS:
        raise CheckpointError(
            f"{path} is a Git LFS pointer and not the file itself: run `git lfs pull` in its clone, or download it"
        )
    if path.suffix == ".json" and start.startswith(BOM_UTF8):
        raise CheckpointError(f"{path} begins with a byte order mark: save it as UTF-8 without one")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: no such file, or its contents are not a JSON object.
    """
    try:
        check_readable(path)
        contents = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"the checkpoint {path.parent} holds no {path.name}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} must hold a JSON object, but it holds a {type(contents).__name__}")
    return contents
