"""The temporary folder of a server: its model repository, under names that no shell can misread.

Triton's Python backend starts each model with ``bash -c`` and a line that it joins from paths and names without quoting
them. So the server never sees a path of the user: it gets a folder of safe name, which holds the configurations and the
code of this package, and a link to the bundle for its graphs. The bundle's own configurations and code are for a Triton
that is started without Blipstream; here they are never run.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from blipstream.contract import GRAPH_FILE, MODEL_NAMES, MODEL_VERSION
from blipstream.errors import ServerStartError
from blipstream.manifest import Manifest
from blipstream.repository import write_models

BUNDLE_VARIABLE = "BLIPSTREAM_BUNDLE"
"""Environment variable that tells the models where the bundle is; without it, it is the model repository itself."""

_SAFE = re.compile(r"/[A-Za-z0-9_./-]*", re.ASCII)
_LONGEST = 40
"""Characters of a place for temporary files: models put sockets into it, whose paths have 107 at most."""
_PLACES = ("/tmp", "/var/tmp", "/dev/shm")  # mkdtemp makes a folder of our own there


class ServerFolder:
    """A new folder; :meth:`close` removes it.

    Raises:
        ServerStartError: it cannot be written anywhere.
    """

    def __init__(self) -> None:
        self.path = _make_folder()
        self.models = self.path / "models"
        self.backends = self.path / "backends"
        self._links: dict[Path, str] = {}

    def fill(self, bundle: Path, manifest: Manifest, *, embedded: bool) -> None:
        """Write the model repository of a bundle.

        Args:
            bundle: as the user gave it.
            manifest: of the bundle.
            embedded: configure every model for Triton's Python backend.

        Raises:
            ServerStartError: the folder cannot be written.
        """
        with self._writing():
            self._link("bundle", Path(os.path.realpath(bundle)), str(bundle))
            self.models.mkdir()
            self.backends.mkdir()
            write_models(self.models, manifest, embedded=embedded)
            for name in () if embedded else MODEL_NAMES:  # what Triton's own backends load
                graph = Path(name, MODEL_VERSION, manifest.graph_file(GRAPH_FILE))
                if (bundle / graph).is_file():
                    (self.models / graph).symlink_to(self.bundle / graph)

    @property
    def bundle(self) -> Path:
        """The bundle under a safe name."""
        return self.path / "bundle"

    def environment(self) -> dict[str, str]:
        """Variables that lead the models to the bundle, and their temporary files into this folder."""
        return {BUNDLE_VARIABLE: str(self.bundle), "TMPDIR": str(self.path)}

    def safe(self, path: Path) -> Path:
        """A path under which a shell, or a list of paths, can have a folder: its own, or a link's.

        Raises:
            ServerStartError: the folder cannot be written.
        """
        if is_safe(path):
            return path
        with self._writing():
            return self._link(f"link{len(self._links)}", path, str(path))

    def restore(self, text: str) -> str:
        """A text of the server with the user's paths in place of links."""
        for link, path in reversed(self._links.items()):
            text = text.replace(str(link), path)
        return text

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _link(self, name: str, target: Path, shown: str) -> Path:
        link = self.path / name
        link.symlink_to(target, target_is_directory=True)
        self._links[link] = shown
        return link

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.close()
            raise ServerStartError(f"the server's folder {self.path} cannot be written: {error.strerror}") from None


def is_safe(path: Path) -> bool:
    """Whether an absolute path means the same to a shell and in a list of paths."""
    return _SAFE.fullmatch(str(path)) is not None


def _make_folder() -> Path:
    places: list[str] = []
    with suppress(FileNotFoundError):  # no place at all can be written
        places.append(tempfile.gettempdir())
    faults = []
    for place in dict.fromkeys((*places, *_PLACES)):
        if is_safe(Path(place)) and len(place) <= _LONGEST:
            try:
                return Path(tempfile.mkdtemp(prefix="blipstream-", dir=place))
            except OSError as error:
                faults.append(f"{place} ({error.strerror})")
    raise ServerStartError(f"the server needs a temporary folder, and none can be made in {', '.join(faults)}")
