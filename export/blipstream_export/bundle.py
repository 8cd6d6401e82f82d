"""Writing a bundle: into a temporary folder beside its destination, which gets its name when all is done.

A build that fails, or is interrupted, leaves nothing behind. An existing bundle is replaced only when asked for, and
stays in place until the new one is whole.
"""

from __future__ import annotations

import hashlib
import shutil
import string
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from blipstream.contract import EMBEDDED_CONFIG, MODEL_NAMES, MODEL_VERSION
from blipstream.errors import BundleError
from blipstream.manifest import LAYERS_FILE, MANIFEST_FILE, PARITY_FILE, FileEntry

PYTHON = "python"
"""The backend of Triton that every model has a configuration for."""

_CONFIG = "config.pbtxt"
_HASH_CHUNK = 1 << 20


@contextmanager
def new_bundle(output: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to write the bundle into; it becomes ``output`` when the block ends without an error.

    Raises:
        BundleError: ``output`` exists and is no bundle, or is one and ``replace`` is not set.
    """
    output = output.absolute()
    check_output(output, replace=replace)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    try:
        partial.chmod(0o755)
        yield partial
        _put(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_output(output: Path, *, replace: bool) -> None:
    """Refuse a destination that holds anything but an empty folder, or a bundle that may be replaced.

    Raises:
        BundleError: the message says what is there.
    """
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir():
        raise BundleError(f"{output} exists and is not a folder, and a bundle is one: choose another output")
    if not any(output.iterdir()):
        return
    if not (output / MANIFEST_FILE).is_file():
        raise BundleError(f"{output} exists and is not a bundle (it holds no {MANIFEST_FILE}): choose another output")
    if not replace:
        raise BundleError(f"{output} already holds a bundle: pass --force to replace it, or choose another output")


def _put(partial: Path, output: Path) -> None:
    if not output.exists():
        partial.rename(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".old", dir=output.parent))
    try:
        output.rename(old / "bundle")
        try:
            partial.rename(output)
        except OSError:
            (old / "bundle").rename(output)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def model_repository() -> Path:
    """The Triton models that a bundle is made of: inside the wheel, or in the source tree of an editable install.

    Raises:
        BundleError: neither is there.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "model_repository", package.parents[1] / "model_repository"):
        if folder.is_dir():
            return folder
    raise BundleError(f"the Triton models are missing: expected {package / 'model_repository'}, as the wheel has it")


def copy_models(
    bundle: Path, values: Mapping[str, int | str], *, instructed: bool = False, backend: str = PYTHON
) -> None:
    """Copy every Triton model into the bundle, with ``$name`` in each ``config.pbtxt`` replaced by ``values[name]``.

    Args:
        bundle: the folder.
        values: sizes by name.
        instructed: whether the Q-Former reads instructions; models with another configuration then have it beside
            the plain one, as ``config.instructed.pbtxt``.
        backend: of Triton, for the models that another than Python's can run; these have a configuration for it, as
            ``config.tensorrt.pbtxt``, and keep Python's as the one called :data:`~blipstream.contract.EMBEDDED_CONFIG`.

    Raises:
        BundleError: a model of the contract is missing, or a configuration uses a name that has no value.
    """
    source = model_repository()
    for name in MODEL_NAMES:
        model, target = source / name, bundle / name
        if not (model / _CONFIG).is_file():
            raise BundleError(f"the Triton model {name} is missing: expected {model / _CONFIG}")
        shutil.copytree(
            model,
            target,
            dirs_exist_ok=True,
            copy_function=shutil.copyfile,
            ignore=shutil.ignore_patterns("__pycache__", ".*", "*.pyc", "*.pbtxt"),
        )
        (target / MODEL_VERSION).mkdir(exist_ok=True)  # an ensemble's is empty, and git keeps no such folder
        plain, variants = _templates(model, instructed, backend)
        for template, path in (
            (plain, target / _CONFIG),
            *((other, target / path) for path, other in variants.items()),
        ):
            path.parent.mkdir(exist_ok=True)
            path.write_text(_fill(template, values), encoding="utf-8")


def _templates(model: Path, instructed: bool, backend: str) -> tuple[Path, dict[str, Path]]:
    """Template of a model's ``config.pbtxt``, and those of the configurations beside it, by their paths."""
    kind = "instructed." if instructed and (model / "config.instructed.pbtxt").is_file() else ""
    plain, other = model / f"config.{kind}pbtxt", model / f"config.{kind}{backend}.pbtxt"
    if not other.is_file():
        return plain, {}
    return other, {f"configs/{EMBEDDED_CONFIG}.pbtxt": plain}


def _fill(config: Path, values: Mapping[str, int | str]) -> str:
    try:
        return string.Template(config.read_text(encoding="utf-8")).substitute(values)
    except (KeyError, ValueError) as error:
        raise BundleError(
            f"{config} uses a placeholder that has no value ({error}); there are {', '.join(sorted(values))}"
        ) from None


def list_files(bundle: Path) -> dict[str, FileEntry]:
    """Every file of a bundle but the manifest and the reports, by its path relative to the bundle."""
    paths = sorted(path for path in bundle.rglob("*") if path.is_file())
    entries = {path.relative_to(bundle).as_posix(): path for path in paths}
    return {
        name: _entry(path) for name, path in entries.items() if name not in (MANIFEST_FILE, PARITY_FILE, LAYERS_FILE)
    }


def _entry(path: Path) -> FileEntry:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return FileEntry(bytes=path.stat().st_size, sha256=digest.hexdigest())
