"""Where the pip-installed ``tritonserver`` is, and what its process needs around it.

``nvidia-pytriton`` carries a whole ``tritonserver``: the binary, its libraries, the Python backend, and that backend's
*stub* (the program that embeds a Python interpreter and runs one model) for each version of CPython. The server wants a
backend folder that holds the backend and the right stub; :meth:`Installation.make_backends` makes one of links.

The same bundle is a model repository for any Triton with the Python backend, NVIDIA's container among them
(:mod:`blipstream.triton.container`), once ``pip install '.[models]'`` was run for the interpreter that its
stub embeds. What this package does beyond that is to find the server, to bound its threads and to clean up after it.
The pip-installed server is older than Triton's security fixes of 2025; therefore it is bound to the loopback address,
and serving a network is the container's part.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from blipstream.errors import ServerStartError
from blipstream.extras import install

_PACKAGE = "pytriton"
_LIBRARIES = "nvidia_pytriton.libs"
_STUB = "triton_python_backend_stub"
_DROPPED = re.compile(r"(BASH_ENV|ENV|SHELLOPTS|BASHOPTS|PYTHONHOME|PYTHONINSPECT|PYTHONWARNINGS)$|BASH_FUNC_")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


@dataclass(frozen=True)
class Installation:
    """The files of a pip-installed ``tritonserver``."""

    binary: Path
    backend: Path
    """Folder of the Python backend, without a stub."""
    stub: Path
    """Stub of the running interpreter."""
    libraries: Path

    @classmethod
    def find(cls) -> Installation:
        """Find it in the running interpreter's packages.

        Raises:
            ServerStartError: it is not installed, or not for this interpreter, or NumPy is too new for it.
        """
        spec = importlib.util.find_spec(_PACKAGE)
        if spec is None or spec.origin is None:
            raise ServerStartError(f"tritonserver is not installed: {install('server')} brings it")
        _check_numpy()
        package = Path(spec.origin).parent
        root = package / "tritonserver"
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        found = cls(
            binary=root / "bin" / "tritonserver",
            backend=root / "backends" / "python",
            stub=root / "python_backend_stubs" / python / _STUB,
            libraries=package.parent / _LIBRARIES,
        )
        if not found.stub.is_file():
            versions = ", ".join(sorted(path.name for path in found.stub.parents[1].glob("*")))
            raise ServerStartError(
                f"the installed tritonserver has no stub for Python {python}: it has some for {versions or 'none'}"
            )
        for path in (found.binary, found.backend, found.libraries):
            if not path.exists():
                raise ServerStartError(f"the installed nvidia-pytriton is incomplete: {path} is missing")
        return found

    def make_backends(self, folder: Path) -> None:
        """Fill an empty folder with what ``--backend-directory`` expects."""
        target = folder / "python"
        target.mkdir()
        for path in (*self.backend.iterdir(), self.stub):
            if path.is_file():
                (target / path.name).symlink_to(path)

    def environment(self, threads: int, safe: Callable[[Path], Path] = Path) -> dict[str, str]:
        """Environment of the server's process: this process's own, plus what server, stub and package need.

        Args:
            threads: bound on the threads of numerical libraries; 0 sets none.
            safe: gives the name under which a folder is put into a list of paths.
        """
        variables = inherited_environment()
        folders = [self.libraries, *_python_library_folders()]
        libraries = [*map(str, map(safe, folders)), variables.get("LD_LIBRARY_PATH", "")]
        variables["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, libraries))
        # The stub's interpreter finds its prefix, and so the virtual environment, by the python3 that PATH shows first.
        programs = Path(sys.executable).parent
        paths = [str(safe(programs.parent) / programs.name), variables.get("PATH", os.defpath)]
        variables["PATH"] = os.pathsep.join(paths)
        variables["PYTHONPATH"] = os.pathsep.join([*map(str, map(safe, _import_folders())), *_given_folders(variables)])
        variables["PYTHONUNBUFFERED"] = "1"
        variables["TOKENIZERS_PARALLELISM"] = "false"
        variables.setdefault("ORT_DISABLE_TELEMETRY", "1")
        if threads:
            variables.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
        return variables


def inherited_environment() -> dict[str, str]:
    """This process's environment, without what would change the shell that starts the models or their interpreter."""
    return {name: value for name, value in os.environ.items() if not _DROPPED.match(name)}


def _check_numpy() -> None:
    version = importlib.metadata.version("numpy")
    if int(version.partition(".")[0]) >= 2:
        raise ServerStartError(
            f"numpy {version} is installed, and with the installed tritonserver tensors arrive empty unless numpy is "
            "older than 2: `pip install 'numpy<2'`"
        )


def _python_library_folders() -> list[Path]:
    """Folders that may hold libpython, the running interpreter's own before the system's."""
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    candidates = [Path(sysconfig.get_config_var("LIBDIR") or ""), Path(sys.base_prefix) / "lib"]
    return list(dict.fromkeys(folder for folder in candidates if (folder / name).is_file()))


def _import_folders() -> list[Path]:
    """Folders from which the models import: this package's and the installed packages'."""
    package = Path(__file__).resolve().parents[2]
    installed = [Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    return list(dict.fromkeys((package, *installed)))


def _given_folders(variables: Mapping[str, str]) -> list[str]:
    """The caller's ``PYTHONPATH``; its relative folders are those of this process."""
    entries = [Path(entry) for entry in variables.get("PYTHONPATH", "").split(os.pathsep) if entry]
    try:
        return [str(entry.absolute()) for entry in entries]
    except FileNotFoundError:  # the working directory is gone
        return [str(entry) for entry in entries if entry.is_absolute()]
