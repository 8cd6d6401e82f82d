"""Checking a bundle before it is served."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from blipstream.contract import MODEL_NAMES, MODEL_VERSION
from blipstream.errors import BundleError
from blipstream.manifest import FileEntry, Manifest
from blipstream.repository import CODE_FILE, CONFIG_FILE, own_code

ALWAYS_HASHED = 16 << 20
"""Bytes of a file up to which its hash is always checked: code, configurations and tokenizers are smaller."""

_CONFIG_SUFFIX = ".pbtxt"
_CODE_SUFFIXES = frozenset({".py", ".so", _CONFIG_SUFFIX})
_STUB = "triton_python_backend_stub"
"""Triton runs a program of this name in a model's folder in place of its own."""


def check_bundle(bundle: Path, *, verify: bool = False) -> Manifest:
    """Read a bundle's manifest, and check that its files are those that the manifest names.

    Every file must exist with its size. Hashes are checked for files of up to :data:`ALWAYS_HASHED` bytes, with
    ``verify`` for all. Code must be Blipstream's own, and the manifest must name all of it.

    Raises:
        BundleError: not a bundle, of another revision, unreadable, or with files that are missing, changed or not
            Blipstream's; all are named.
    """
    manifest = Manifest.load(bundle)
    try:
        _check_files(bundle, manifest, verify)
    except OSError as error:
        raise BundleError(f"{error.filename or bundle} cannot be read: {error.strerror}") from None
    return manifest


def _check_files(bundle: Path, manifest: Manifest, verify: bool) -> None:
    outside = [name for name in manifest.files if name.startswith("/") or ".." in PurePosixPath(name).parts]
    if outside:
        raise BundleError(f"the manifest of {bundle} names files outside of it: {_list(outside)}")
    wanted = {*manifest.files, *(f"{name}/{CONFIG_FILE}" for name in MODEL_NAMES)}
    missing = [name for name in wanted if not (bundle / name).is_file()]
    if missing:
        raise BundleError(f"{bundle} is incomplete, build it again: it lacks {_list(missing)}")
    foreign = list(_foreign_code(bundle, manifest))
    if foreign:
        raise BundleError(f"{bundle} holds code that is not Blipstream's, remove it: {_list(foreign)}")
    faults = (_fault(bundle / name, name, entry, verify) for name, entry in sorted(manifest.files.items()))
    wrong = [fault for fault in faults if fault]
    if wrong:
        raise BundleError(f"{bundle} is damaged, build it again: {'; '.join(wrong)}")


def _fault(path: Path, name: str, entry: FileEntry, verify: bool) -> str | None:
    size = path.stat().st_size
    if size != entry.bytes:
        return f"{name} has {size} bytes and should have {entry.bytes}"
    if (verify or size <= ALWAYS_HASHED) and sha256(path) != entry.sha256:
        return f"{name} has other contents than its hash says"
    return None


def _foreign_code(bundle: Path, manifest: Manifest) -> Iterator[str]:
    """Files that Triton or a model could run, as deep as a model repository goes: unnamed, or not this package's."""
    own = {f"{model}/{MODEL_VERSION}/{CODE_FILE}": own_code(model) for model in MODEL_NAMES}
    for path in (*bundle.glob("*/*"), *bundle.glob("*/*/*")):
        if path.suffix in _CODE_SUFFIXES or path.name == _STUB:
            name = path.relative_to(bundle).as_posix()
            is_own = path.suffix == _CONFIG_SUFFIX or (name in own and path.read_bytes() == own[name])
            if name not in manifest.files or not is_own:
                yield name


def _list(names: list[str]) -> str:
    return ", ".join(sorted(set(names)))


def sha256(path: Path) -> str:
    """Hash of a file, in hexadecimal, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
