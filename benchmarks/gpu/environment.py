"""What this machine has: ``python -m benchmarks.gpu.environment FILE`` writes it as JSON.

It runs in a process of its own, so that a driver or a package that crashes takes nothing else along.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.setting import cpu_model

_PACKAGES = (
    "blipstream",
    "torch",
    "triton",
    "transformers",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-cu13-bindings",
    "cuda-bindings",
    "nvidia-pytriton",
    "numpy",
)
_QUERIED = (
    "name",
    "driver_version",
    "memory.total",
    "compute_cap",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
)
"""Asked of ``nvidia-smi``, which a Jetson may lack; torch tells the rest then."""
_SMI_TIMEOUT_S = 30
_MIB = 1 << 20


@dataclass(frozen=True)
class Environment:
    """What the parts are chosen by, and what the report says of the machine.

    Attributes:
        date: ISO 8601, UTC.
        gpu: name of the first GPU; None without one.
        compute_capability: as in ``9.0``.
        gpu_memory: bytes.
        driver: version.
        clocks: what ``nvidia-smi`` says of clock rates (MHz) and of the power limit (W), by its own names.
        torch_cuda: CUDA version that torch was built with; None for a build without.
        torch_sees_gpu: whether torch computes on it.
        tensorrt: version of a TensorRT that can be imported, its library included.
        providers: execution providers of ONNX Runtime.
        versions: of the packages that are installed.
        cpu: model of the processor.
        cores: that this process may use.
    """

    date: str
    gpu: str | None = None
    compute_capability: str | None = None
    gpu_memory: int | None = None
    driver: str | None = None
    clocks: Mapping[str, str] = field(default_factory=dict)
    torch_cuda: str | None = None
    torch_sees_gpu: bool = False
    tensorrt: str | None = None
    providers: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    cpu: str = ""
    cores: int = 1

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Environment:
        """Read what :meth:`write` wrote."""
        data = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**data, "providers": tuple(data["providers"])})


def probe() -> Environment:
    """Look at this machine."""
    found = {**_torch_says(), **parse_smi(_nvidia_smi())}
    return Environment(
        date=dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        versions=_versions(),
        tensorrt=_tensorrt(),
        providers=_providers(),
        cpu=cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        **found,
    )


def parse_smi(line: str) -> dict[str, Any]:
    """Fields of an :class:`Environment` from one line of ``nvidia-smi``'s CSV; none from an empty one."""
    values = dict(zip(_QUERIED, (value.strip() for value in line.split(",")), strict=False))
    if len(values) < len(_QUERIED):
        return {}
    known = {name: value for name, value in values.items() if not value.startswith("[")}  # [N/A], [Not Supported]
    found: dict[str, Any] = {
        "gpu": known.get("name"),
        "driver": known.get("driver_version"),
        "compute_capability": known.get("compute_cap"),
        "clocks": {name: value for name, value in known.items() if name.startswith(("clocks", "power"))},
    }
    if "memory.total" in known:
        found["gpu_memory"] = int(float(known["memory.total"]) * _MIB)
    return {name: value for name, value in found.items() if value}


def _nvidia_smi() -> str:
    """Its line about the first GPU; empty without one."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERIED)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0] if done.returncode == 0 else ""


def _torch_says() -> dict[str, Any]:
    torch = _imported("torch")
    if torch is None:
        return {}
    found: dict[str, Any] = {"torch_cuda": torch.version.cuda, "torch_sees_gpu": torch.cuda.is_available()}
    if found["torch_sees_gpu"]:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_memory": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
        }
    return found


def _tensorrt() -> str | None:
    module = _imported("tensorrt")
    return None if module is None else str(module.__version__)


def _providers() -> tuple[str, ...]:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    module = _imported("onnxruntime")
    return () if module is None else tuple(module.get_available_providers())


def _imported(name: str) -> Any:
    """The module, or None where it, or a library that it needs, is missing."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        print(f"{name} cannot be imported: {type(error).__name__}: {error}")
        return None


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    probe().write(Path(sys.argv[1]))
