"""Writing a bundle: into a temporary folder beside its destination, which gets its name when all is done.

A build that fails, or is interrupted, leaves nothing behind. An existing bundle is replaced only when asked for, and
stays in place until the new one is whole.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blipstream.bundle import sha256
from blipstream.errors import BundleError
from blipstream.manifest import LAYERS_FILE, MANIFEST_FILE, PARITY_FILE, FileEntry

_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@contextmanager
def new_bundle(output: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to write the bundle into; it becomes ``output`` when the block ends without an error.

    Raises:
        BundleError: ``output`` exists and is no bundle, or is one and ``replace`` is not set; or it cannot be written.
    """
    partial: Path | None = None
    try:
        output = output.absolute()
        check_output(output, replace=replace)
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = _folder_beside(output, ".partial")
        partial.chmod(0o755)
        yield partial
        _put(partial, output)
    except OSError as error:
        ours = partial is None or str(error.filename).startswith(str(partial))
        if not ours and error.errno not in _DISK_FAULTS:
            raise
        raise BundleError(f"{output} cannot be written: {error.strerror}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _folder_beside(output: Path, suffix: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{output.name[:40]}.", suffix=suffix, dir=output.parent))


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
    old = _folder_beside(output, ".old")
    try:
        output.rename(old / "bundle")
        try:
            partial.rename(output)
        except OSError:
            (old / "bundle").rename(output)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def list_files(bundle: Path) -> dict[str, FileEntry]:
    """Every file of a bundle but the manifest and the reports, by its path relative to the bundle."""
    paths = sorted(path for path in bundle.rglob("*") if path.is_file())
    entries = {path.relative_to(bundle).as_posix(): path for path in paths}
    return {
        name: _entry(path) for name, path in entries.items() if name not in (MANIFEST_FILE, PARITY_FILE, LAYERS_FILE)
    }


def _entry(path: Path) -> FileEntry:
    return FileEntry(bytes=path.stat().st_size, sha256=sha256(path))
