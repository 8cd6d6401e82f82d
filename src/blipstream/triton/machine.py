"""What a server needs of this machine, and how its processes are."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from blipstream.config import ServerConfig
from blipstream.contract import IMAGE_EMBEDS, PIXEL_VALUES
from blipstream.errors import ServerStartError
from blipstream.manifest import Manifest

SHM = Path("/dev/shm")
LEAST_SHARED_BYTES = 16 << 20
"""Of shared memory that an idle server takes, with some to spare."""
_FLOAT_BYTES = 4


def check_machine(environment: Mapping[str, str]) -> None:
    """Check that a server can be started here at all.

    Raises:
        ServerStartError: there is no ``bash``, by which Triton starts its models, or next to no shared memory.
    """
    if shutil.which("bash", path=environment.get("PATH")) is None:
        raise ServerStartError("bash is not installed, and Triton starts every model with it")
    free = free_shared_bytes()
    if free < LEAST_SHARED_BYTES:
        raise ServerStartError(
            f"{SHM} has {_mib(free)} free, and the server needs {_mib(LEAST_SHARED_BYTES)} to start: enlarge it "
            "(docker run --shm-size)"
        )


def shared_memory_warning(manifest: Manifest, config: ServerConfig) -> str | None:
    """What to say where requests that the settings allow do not fit into the free shared memory.

    The largest image that is allowed travels from the server to ``blip2`` and on to ``preprocess``; a full batch of
    pixels and of what the ViT computes from them travels between server and models.
    """
    pixels, embeds = (_bytes(manifest.shape(spec)) for spec in (PIXEL_VALUES, IMAGE_EMBEDS))
    wanted = LEAST_SHARED_BYTES + 2 * config.max_image_bytes + 2 * manifest.max_batch * (pixels + embeds)
    free = free_shared_bytes()
    if free >= wanted:
        return None
    return (
        f"{SHM} has {_mib(free)} free, and with images of up to {_mib(config.max_image_bytes)} the server may need "
        f"{_mib(wanted)}: enlarge it (docker run --shm-size), or lower --max-image-bytes; requests fail when it is full"
    )


def free_shared_bytes() -> int:
    """Bytes that are free in :data:`SHM`; 0 where there is none."""
    try:
        status = os.statvfs(SHM)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize


def has_dead_model(guard: int) -> bool:
    """Whether a model's process has died, and the server that the process ``guard`` watches has not noticed."""
    return any(_is_dead(model) for server in _children(guard) for model in _children(server))


def _children(pid: int) -> Iterator[int]:
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            yield from map(int, tasks.read_text().split())


def _is_dead(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return False


def _bytes(shape: tuple[int, ...]) -> int:
    return math.prod(shape) * _FLOAT_BYTES


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.0f} MiB"
