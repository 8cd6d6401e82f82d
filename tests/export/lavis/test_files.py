"""Reading ``.pth`` files: tensors, mapped from disk; whatever else is refused in one sentence and never run."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blipstream_export.lavis.files import read_tensors

from blipstream.errors import CheckpointError

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2, dtype=torch.float16)}


class Touch:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self._path,)


@pytest.mark.parametrize("contents", [TENSORS, {"model": TENSORS, "optimizer": {0: torch.zeros(1)}, "epoch": 3}])
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_by_name(contents: dict[str, Any], zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "part.pth"
    torch.save(contents, path, _use_new_zipfile_serialization=zipped)
    found = read_tensors(path)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_values_that_are_no_tensors_are_left_out(tmp_path: Path) -> None:
    torch.save({**TENSORS, "version": 3, "name": "x", 7: torch.zeros(1)}, tmp_path / "part.pth")
    assert read_tensors(tmp_path / "part.pth").keys() == TENSORS.keys()


def test_a_large_file_is_mapped_and_not_read(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(16_000_000)}, tmp_path / "part.pth")
    before = _resident_bytes()
    tensors = read_tensors(tmp_path / "part.pth")
    assert _resident_bytes() - before < 16_000_000  # a quarter of what it holds
    assert tensors["a"].shape == (16_000_000,)


def _write(contents: Any) -> Callable[[Path], object]:
    return lambda path: torch.save(contents, path)


def _truncated(path: Path) -> None:
    torch.save(TENSORS, path)
    path.write_bytes(path.read_bytes()[:-300])


def _script(path: Path) -> None:
    class Doubled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x

    torch.jit.trace(Doubled(), torch.zeros(1)).save(path)


def _archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (lambda _: None, r"part.pth does not exist, and a .pth file of tensors was expected there"),
    "a folder": (lambda path: path.mkdir(), "part.pth is not a file, and a .pth file"),
    "empty": (lambda path: path.touch(), "is not a .pth file of tensors as torch.save writes it, or it is damaged"),
    "text": (lambda path: path.write_text("no pickle"), "is not a .pth file of tensors as torch.save writes it"),
    "another archive": (_archive, "is not a .pth file of tensors as torch.save writes it"),
    "another pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "is not a .pth file of tensors"),
    "truncated": (_truncated, "is not a .pth file of tensors as torch.save writes it, or it is damaged"),
    "a list": (_write([torch.zeros(1)]), "holds a list, and a dictionary of tensors was expected"),
    "no tensors": (_write({"epoch": 1, "lr": 0.1}), r"holds no tensors by name.*it has: epoch, lr"),
    "nothing": (_write({"model": {}}), r"holds no tensors by name.*it has: nothing"),
    "numpy": (_write({"model": TENSORS, "best": np.float64(1)}), r"needs code to be read \(numpy\..*scalar\)"),
    "a Git LFS pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"),
        "is a Git LFS pointer and not the file itself: run `git lfs pull`",
    ),
    "TorchScript": (_script, "is a TorchScript archive, which holds code"),
}


@pytest.mark.parametrize("name", FAULTS)
# torch says of its own tracing that it is deprecated
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore:.torch.jit:FutureWarning")
def test_each_fault_is_one_sentence(name: str, tmp_path: Path) -> None:
    fault, message = FAULTS[name]
    fault(tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match=message) as raised:
        read_tensors(tmp_path / "part.pth")
    assert "\n" not in str(raised.value)
    assert str(tmp_path / "part.pth") in str(raised.value)


@pytest.mark.parametrize("dump", [torch.save, lambda contents, path: path.write_bytes(pickle.dumps(contents))])
def test_code_is_not_run(dump: Callable[[Any, Path], object], tmp_path: Path) -> None:
    dump({"model": TENSORS, "trap": Touch(tmp_path / "sprung")}, tmp_path / "part.pth")
    with pytest.raises(CheckpointError):
        read_tensors(tmp_path / "part.pth")
    assert not (tmp_path / "sprung").exists()


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
