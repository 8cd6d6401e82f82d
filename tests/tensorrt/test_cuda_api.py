"""What is used of the CUDA runtime is in NVIDIA's own bindings, and the simulated runtime takes the same arguments."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.simulated import simulated_gpu
from tests.tensorrt.standins import ROOT

runtime = pytest.importorskip("cuda.bindings.runtime")

SOURCE = ROOT / "src/blipstream/engines/cuda.py"


def used(path: Path, name: str = "runtime") -> list[str]:
    """Every dotted path that begins with ``name``, without it."""
    paths = []
    for node in ast.walk(ast.parse(path.read_text())):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id == name:
            paths.append(".".join(reversed(parts)))
    return paths


def is_there(module: ModuleType, path: str) -> bool:
    found: object = module
    for part in path.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def documented(name: str) -> list[str]:
    """Names of a function's parameters, by the first line of its documentation."""
    listed = re.match(rf"{name}\((.*)\)", getattr(runtime, name).__doc__)
    assert listed is not None
    return [part.partition(":")[0].split()[-1] for part in listed[1].split(",") if part.strip()]


def test_every_name_is_there() -> None:
    paths = used(SOURCE)
    assert len(set(paths)) > 20
    assert [path for path in paths if not is_there(runtime, path)] == []


def test_a_wrong_name_would_be_found(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text("runtime.cudaMalloc(1)\nruntime.cudaMemcpyKind.cudaMemcpyHostToGpu\n")
    assert [path for path in used(source) if not is_there(runtime, path)] == ["cudaMemcpyKind.cudaMemcpyHostToGpu"]


def test_the_simulated_runtime_takes_the_same_arguments() -> None:
    with simulated_gpu():
        from cuda.bindings import runtime as simulated

        functions = {
            name: list(inspect.signature(function).parameters)
            for name, function in inspect.getmembers(simulated, inspect.isfunction)
            if name.startswith("cuda")
        }
    assert len(functions) > 15
    assert simulated is not runtime
    for name, parameters in functions.items():
        assert parameters == documented(name), name


def test_the_simulated_runtime_leaves_nothing_behind() -> None:
    """``inspect``, which looks through all modules for the one of a file, finds its way after it as before."""
    with simulated_gpu():
        importlib.import_module("cuda.bindings.runtime")
        assert inspect.getmodule(None, "/nowhere.py") is None
    assert inspect.getmodule(None, "/nowhere.py") is None
    assert importlib.import_module("cuda.bindings.runtime") is runtime
