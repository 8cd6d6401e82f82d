"""Serving a bundle in NVIDIA's Triton container: ``python3 -m blipstream.triton.container BUNDLE [OPTION ...]``.

It checks the bundle and that the container's TensorRT loads the bundle's engines, writes a model repository of safe
paths (:mod:`blipstream.triton.folder`), and then becomes ``tritonserver``, which so gets the signals of the container.
Options are handed on to it, after those of :func:`server_command`.

Triton answers SIGTERM by refusing new requests and unloading its models when those that run are answered, for
:data:`DRAIN_S` seconds at most; whoever stops the container must wait longer than that before killing it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from blipstream.bundle import check_bundle
from blipstream.config import ServerConfig
from blipstream.engines.platform import check_version
from blipstream.errors import BlipstreamError, EngineError
from blipstream.manifest import PlanSection
from blipstream.triton.folder import ServerFolder
from blipstream.triton.installation import inherited_environment

DRAIN_S = 60
"""Seconds that running requests have when the server is told to stop."""
TENSORRT_LIBRARY = "libnvinfer.so.11"
_PROGRAM = "tritonserver"


def main(arguments: Sequence[str]) -> int:
    """Become the server of the bundle that ``arguments`` begin with; return only when that cannot be."""
    if not arguments:
        print("usage: python3 -m blipstream.triton.container BUNDLE [OPTION ...]", file=sys.stderr)
        return 2
    bundle = Path(arguments[0])
    try:
        manifest = check_bundle(bundle)
        check_tensorrt(manifest.plans)
        ServerConfig.from_environment()
        folder = ServerFolder()
        folder.fill(bundle, manifest, embedded=False)
        environment = {**inherited_environment(), **folder.environment()}
        os.execvpe(_PROGRAM, server_command(folder.models, arguments[1:]), environment)
    except BlipstreamError as error:
        fault = str(error)
    except FileNotFoundError:
        folder.close()
        fault = f"there is no {_PROGRAM} on PATH: this is meant for NVIDIA's Triton container"
    print(f"blipstream: {fault}", file=sys.stderr)
    return 1


def server_command(repository: Path, options: Sequence[str] = ()) -> list[str]:
    """The command line of ``tritonserver``."""
    return [
        _PROGRAM,
        f"--model-repository={repository}",
        "--disable-auto-complete-config",  # the configurations are complete; it would load each model twice
        f"--exit-timeout-secs={DRAIN_S}",
        *options,
    ]


def check_tensorrt(plans: PlanSection | None, library: str = TENSORRT_LIBRARY) -> None:
    """See that the TensorRT of this container loads a bundle's engines.

    Args:
        plans: what the manifest says of them; None of a bundle that has none.
        library: TensorRT's runtime.

    Raises:
        EngineError: it does not.
    """
    if plans is None:
        return
    here = installed_tensorrt(library)
    if here is None:
        raise EngineError(
            f"the bundle's engines need TensorRT {plans.tensorrt}, but there is no {library} in this container"
        )
    check_version(plans, here)


def installed_tensorrt(library: str = TENSORRT_LIBRARY) -> str | None:
    """Version of TensorRT's runtime as in ``11.4.0.106``; None where there is none."""
    try:
        runtime = ctypes.CDLL(library)
    except OSError:
        return None
    parts = ("Major", "Minor", "Patch", "Build")
    return ".".join(str(getattr(runtime, f"getInferLib{part}Version")()) for part in parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
