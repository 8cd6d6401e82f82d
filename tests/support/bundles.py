"""Random checkpoints, and bundles, made once for all workers and for later runs.

    checkpoint = checkpoint_of(save_blip2, "llama", seed=3)
    bundle = bundle_of(checkpoint, BuildOptions(max_sequences=5))

A test must not change what it gets: it copies it first. The key of a checkpoint holds the function that writes it, its
arguments and the sources in ``tests``; that of a bundle holds the checkpoint's bytes, the options, and the sources that
a build runs. Both hold the versions of all installed packages.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

if TYPE_CHECKING:
    from blipstream_export.build import BuildOptions

ROOT = Path(__file__).resolve().parents[2]
STORE = ROOT / ".work" / "test-store"
LOCK_S = 300.0
"""How long one worker waits for the other to make the same thing."""
KEPT_S = 7 * 24 * 3600.0
"""Time after its last use at which an entry is removed."""

PACKAGE = ROOT / "src" / "blipstream"
NOT_BUILT = tuple(PACKAGE / name for name in ("bench", "commands", "planning", "triton"))
"""What no build runs; a test checks that nothing else imports it."""
BUILDING = (PACKAGE, ROOT / "export", ROOT / "kernels", ROOT / "model_repository", ROOT / "tests" / "simulated")


def checkpoint_of(save: Callable[..., Path], *arguments: Any, **options: Any) -> Path:
    """The checkpoint that ``save(folder, *arguments, **options)`` writes."""
    what = f"{save.__module__}.{save.__qualname__} {arguments} {sorted(options.items())}"
    key = digest(what, _makers(), _installed())
    return stored(f"checkpoint-{key}", lambda folder: save(folder, *arguments, **options))


def bundle_of(checkpoint: Path, options: BuildOptions | None = None) -> Path:
    """The bundle built of a checkpoint; one of plans is built on the simulated GPU."""
    from blipstream_export.build import BuildOptions, build

    from tests.simulated import simulated_gpu

    options = options or BuildOptions()
    if options.calibration or options.test_set or options.plans:
        raise ValueError("the contents of files that options name are not in the key: call build()")

    def make(folder: Path) -> None:
        with contextlib.ExitStack() as stack:
            if options.engine == "tensorrt":
                stack.enter_context(simulated_gpu())
            build(str(checkpoint), folder, options)

    key = digest(contents([checkpoint]), repr(options), sources_of_a_build(), _installed())
    return stored(f"bundle-{key}", make)


def stored(name: str, make: Callable[[Path], object], store: Path = STORE) -> Path:
    """The folder ``name`` of the store; where it is missing, ``make`` writes it."""
    store.mkdir(parents=True, exist_ok=True)
    entry = store / name
    with FileLock(store / f"{name}.lock", timeout=LOCK_S):
        if not entry.exists():
            unfinished = store / f"{name}.{os.getpid()}"
            try:
                make(unfinished)
                unfinished.rename(entry)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
            prune(store)
        os.utime(entry)
    return entry


def prune(store: Path) -> None:
    """Remove what nobody has used for long, and what an interrupted run has left."""
    for path in store.iterdir():
        if time.time() - path.stat().st_mtime > KEPT_S:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def contents(paths: Iterable[Path], without: Iterable[Path] = ()) -> str:
    """Digest of the names and bytes of all files in some folders."""
    left_out = tuple(without)
    parts = []
    for path in paths:
        for file in sorted(path.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts and not set(left_out) & set(file.parents):
                parts += [str(file.relative_to(path)), hashlib.sha256(file.read_bytes()).hexdigest()]
    return digest(*parts)


@functools.cache
def sources_of_a_build() -> str:
    return contents(BUILDING, NOT_BUILT)


@functools.cache
def _makers() -> str:
    files = sorted([*(ROOT / "tests").glob("*.py"), *(ROOT / "tests" / "support").rglob("*.py")])
    return digest(*(file.read_text() for file in files))


@functools.cache
def _installed() -> str:
    packages = sorted(f"{package.name} {package.version}" for package in importlib.metadata.distributions())
    return digest(platform.python_version(), platform.machine(), *packages)
