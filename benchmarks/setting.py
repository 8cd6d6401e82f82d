"""When, where and with what a run is made."""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib.metadata
import json
import platform
import urllib.request
from pathlib import Path

from benchmarks import workload
from benchmarks.rows import Setting
from blipstream.triton.server import TritonServer

_VERSIONED = ("blipstream", "onnxruntime", "torch", "transformers")


def make_setting(
    server: TritonServer | None, checkpoint: Path, threads: int, command: str, load_average: float
) -> Setting:
    """What all rows of a run have in common; without a server, the version of Triton stays empty."""
    triton = "" if server is None else _triton_version(server)
    versions = {name: importlib.metadata.version(name) for name in _VERSIONED}
    folder, repository = checkpoint.resolve(), workload.DEMO.parent
    return Setting(
        date=dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        device=cpu_model(),
        cores=threads,
        threads=threads,
        load_average=round(load_average, 2),
        tritonserver=triton,
        **versions,
        checkpoint=str(folder.relative_to(repository)) if folder.is_relative_to(repository) else folder.name,
        command=command,
    )


def _triton_version(server: TritonServer) -> str:
    with urllib.request.urlopen(f"{server.http_url}/v2", timeout=10) as response:
        return str(json.load(response)["version"])


def cpu_model() -> str:
    """Model of this machine's processor."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
