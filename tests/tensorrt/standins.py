"""TensorRT's Python bindings where there is neither a GPU nor TensorRT.

The bindings (the package ``tensorrt_bindings``) are one extension module that is linked to TensorRT's libraries. All
that it needs of them at import is a handful of C functions, each of which makes an object. A *stand-in* is a shared
library of the wanted name, compiled here, whose functions make nothing: with stand-ins in the library path the bindings
import, with every class, enum and docstring, and whatever would build or run an engine fails. Behind the stand-in of
the main library the *lean runtime* (the package ``tensorrt_lean_libs``) may serve: it has a real plugin registry.

The library path is read when a process starts, so all of this is the environment of a process of its own. Nothing is
written beside the installed packages.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

BINDINGS = "tensorrt_bindings"
LEAN = "tensorrt_lean_libs"
ROOT = Path(__file__).parents[2]

MAIN_LIBRARY = re.compile(r"libnvinfer\.so\.\d+")
LEAN_LIBRARY = "libnvinfer_lean.so.*"

# What TensorRT's own ``tensorrt`` package does: it shows the bindings under the name that users import.
FRONTEND = {
    "tensorrt/__init__.py": f"from {BINDINGS} import *\nfrom {BINDINGS} import __version__\n",
    "tensorrt/plugin/__init__.py": f"from {BINDINGS}.plugin import *\n",
}


class StandinError(Exception):
    """The stand-ins cannot be made, or a process that uses them failed."""


@dataclass(frozen=True)
class Bindings:
    """An environment in which ``import tensorrt`` works.

    Attributes:
        environment: the variables of a process that imports it.
        symbols: the functions whose stand-ins make nothing.
    """

    environment: Mapping[str, str]
    symbols: tuple[str, ...]

    def importing(self, folder: Path) -> Bindings:
        """The same, where modules in ``folder`` are found too."""
        path = f"{folder}{os.pathsep}{self.environment['PYTHONPATH']}"
        return replace(self, environment={**self.environment, "PYTHONPATH": path})

    def run(self, *arguments: str, stdin: str = "", timeout: float = 60) -> str:
        """Run Python with ``arguments`` from the root of the project, and return what it printed.

        Raises:
            StandinError: it did not end with 0 within ``timeout`` seconds; its standard error is in the message.
        """
        done = subprocess.run(
            [sys.executable, *arguments],
            input=stdin,
            cwd=ROOT,
            env=dict(self.environment),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode != 0:
            raise StandinError(f"python {' '.join(arguments)} ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def ask(self, module: str, question: object = None) -> Any:
        """Run a module that calls :func:`answer`, and return its answer.

        Raises:
            StandinError: as :meth:`run`.
        """
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "answer.json"
            self.run("-m", module, str(file), stdin=json.dumps(question))
            return json.loads(file.read_text())


def answer(function: Callable[[Any], object]) -> None:
    """Answer, as a module that is run, :meth:`Bindings.ask`; in a file, since TensorRT's logger has the output."""
    Path(sys.argv[1]).write_text(json.dumps(function(json.load(sys.stdin))))


def missing(*, lean: bool) -> str | None:
    """What :func:`make` needs and this machine lacks, by name; None when nothing does."""
    packages = {BINDINGS: "tensorrt-cu13-bindings", **({LEAN: "tensorrt-lean-cu13-libs"} if lean else {})}
    lacking = [name for module, name in packages.items() if importlib.util.find_spec(module) is None]
    lacking += [tool for tool in ("cc", "readelf") if shutil.which(tool) is None]
    return f"needs {' and '.join(lacking)}" if lacking else None


def make(folder: Path, *, lean: bool) -> Bindings:
    """Compile the stand-ins into ``folder``, with the lean runtime behind the main one if ``lean``."""
    extension = _package(BINDINGS) / "tensorrt.so"
    libraries = [name for name in _needed(extension) if not _loads(name)]
    behind = next(_package(LEAN).glob(LEAN_LIBRARY)) if lean else None
    given = {name for name, is_defined in _symbols(behind) if is_defined} if behind else set()
    symbols = tuple(sorted(_unresolved(extension) - given))
    main = next(name for name in libraries if MAIN_LIBRARY.fullmatch(name))
    for name in libraries:
        _compile(folder / name, symbols if name == main else (), behind if name == main else None)
    for name, text in FRONTEND.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return Bindings(_environment(folder), symbols)


def _package(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _needed(library: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", _readelf("--dynamic", library))


def _symbols(library: Path) -> list[tuple[str, bool]]:
    """Each global symbol of a library, without its version, and whether the library defines it (or else wants it)."""
    # 14: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND getPluginRegistry
    rows = re.findall(r"^.* GLOBAL +DEFAULT +(\w+) ([^@\s]+)", _readelf("--dyn-syms", library), re.MULTILINE)
    return [(name, section != "UND") for section, name in rows]


def _readelf(option: str, file: Path) -> str:
    return subprocess.run(["readelf", "--wide", option, file], capture_output=True, text=True, check=True).stdout


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _unresolved(library: Path) -> set[str]:
    """The symbols that neither this interpreter nor a library that is here gives to ``library``."""
    loaded = [ctypes.CDLL(None), *(ctypes.CDLL(name) for name in _needed(library) if _loads(name))]
    wanted = {name for name, is_defined in _symbols(library) if not is_defined}
    return {name for name in wanted if not any(hasattr(here, name) for here in loaded)}


def _compile(library: Path, functions: Iterable[str], behind: Path | None) -> None:
    """A shared library of these functions, each of which returns a null pointer, linked to the one ``behind`` it."""
    source = library.with_suffix(".c")
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in functions))
    # --no-as-needed: nothing in here calls the library behind, and it has to be loaded all the same.
    link = [f"-Wl,--no-as-needed,-rpath,{behind.parent}", str(behind)] if behind else []
    command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library), str(source), *link]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StandinError(f"{' '.join(command)} failed: {done.stderr}")


def _environment(folder: Path) -> dict[str, str]:
    """This process's environment, in which the modules that it imports are found as well, and kernels are compiled."""
    path = [str(folder), str(ROOT), *(entry for entry in sys.path if entry)]
    libraries = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "PYTHONPATH": os.pathsep.join(path),
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
    }
