"""A GPU for tests, played by the host: packages that take the place of NVIDIA's when this folder is on the path."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path(__file__).parent
_REPLACED = ("cuda", "tensorrt")
_ON_TOP = (
    "blipstream.engines.cuda",
    "blipstream.engines.tensorrt",
    "blipstream_export.plans",
    "blipstream_kernels.plugin",
)


@contextmanager
def simulated_gpu() -> Iterator[None]:
    """Within the block, this process has CUDA and TensorRT."""
    kept = {name: module for name, module in sys.modules.items() if _is_concerned(name)}
    _forget()
    sys.path.insert(0, str(FOLDER))
    try:
        yield
    finally:
        sys.path.remove(str(FOLDER))
        _forget()
        sys.modules.update(kept)
        importlib.invalidate_caches()


def _is_concerned(name: str) -> bool:
    return name.partition(".")[0] in _REPLACED or any(name == one or name.startswith(f"{one}.") for one in _ON_TOP)


def _forget() -> None:
    for name in [name for name in sys.modules if _is_concerned(name)]:
        module = sys.modules.pop(name)
        # It remembers files by the names of modules, and would ask a namespace package that comes back for its file.
        getattr(inspect, "_filesbymodname", {}).pop(name, None)
        package, _, child = name.rpartition(".")
        if package in sys.modules and getattr(sys.modules[package], child, None) is module:
            delattr(sys.modules[package], child)
