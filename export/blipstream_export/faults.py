"""What other libraries raise on damaged files, as one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from blipstream.errors import CheckpointError


@contextmanager
def faults_of(what: str) -> Iterator[None]:
    """Whatever transformers raises on damaged files becomes one sentence; it raises nearly every built-in exception.

    Raises:
        CheckpointError: ``what`` cannot be loaded.
    """
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(f"{what} cannot be loaded: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, with the second where that one announces it; without its full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".:")
