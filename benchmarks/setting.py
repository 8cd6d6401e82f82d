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
_INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx_vnni": "VNNI",
    "avx512_vnni": "VNNI",
    "avx512_bf16": "bf16",
    "amx_tile": "AMX",
    "asimddp": "dot product",
    "i8mm": "i8mm",
    "bf16": "bf16",
}
"""By the names of Linux."""


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


def cpu_model(listing: Path = Path("/proc/cpuinfo")) -> str:
    """Model of this machine's processor, and its instruction sets as far as they decide how fast matrices multiply."""
    found = _first_processor(listing)
    model = found.get("model name") or platform.processor() or platform.machine()
    flags = {*found.get("flags", "").split(), *found.get("Features", "").split()}
    sets = list(dict.fromkeys(name for flag, name in _INSTRUCTION_SETS.items() if flag in flags))
    return f"{model} ({', '.join(sets)})" if sets else model


def _first_processor(listing: Path) -> dict[str, str]:
    with contextlib.suppress(OSError), listing.open() as lines:
        pairs = (line.partition(":") for line in lines)
        return {name.strip(): value.strip() for name, _, value in reversed(list(pairs))}
    return {}
