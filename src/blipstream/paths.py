"""Other names for files, for libraries that cannot take the one that the user gave."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def utf8_path(path: Path) -> Iterator[str]:
    """A name in UTF-8 of a file that exists, for libraries that take no other; it holds within the block.

    The file's own name must be UTF-8. What lies beside it lies beside the new name, too.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield f"/proc/self/fd/{folder}/{path.name}"
        finally:
            os.close(folder)
    else:
        yield os.fspath(path)
