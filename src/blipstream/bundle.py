"""Checking a bundle before it is served."""

from __future__ import annotations

from pathlib import Path

from blipstream.contract import MODEL_NAMES
from blipstream.errors import BundleError
from blipstream.manifest import Manifest


def check_bundle(bundle: Path) -> Manifest:
    """Read a bundle's manifest and see that every file is there, with the size that the manifest tells.

    Raises:
        BundleError: not a bundle, of another revision, or with files missing or of another size; all are named.
    """
    manifest = Manifest.load(bundle)
    wanted = {*manifest.files, *(f"{name}/config.pbtxt" for name in MODEL_NAMES)}
    missing = [name for name in sorted(wanted) if not (bundle / name).is_file()]
    if missing:
        raise BundleError(f"{bundle} is incomplete, build it again: it lacks {', '.join(missing)}")
    sizes = {name: (bundle / name).stat().st_size for name in manifest.files}
    wrong = [
        f"{name} has {sizes[name]} bytes and should have {entry.bytes}"
        for name, entry in sorted(manifest.files.items())
        if sizes[name] != entry.bytes
    ]
    if wrong:
        raise BundleError(f"{bundle} is damaged, build it again: {'; '.join(wrong)}")
    return manifest
