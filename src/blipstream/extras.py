"""The extras of the package: which modules each brings, and how to install it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from blipstream.errors import BlipstreamError

_MODULES = {
    "bench": ("PIL", "google", "grpc", "matplotlib", "prometheus_client", "psutil", "tenacity", "tritonclient"),
    "client": ("google", "grpc", "tenacity", "tritonclient"),
    "cuda": ("cuda", "onnxruntime"),
    "export": (
        "PIL",
        "onnx",
        "onnx_ir",
        "onnxruntime",
        "onnxscript",
        "safetensors",
        "tokenizers",
        "torch",
        "transformers",
    ),
    "kernels": ("torch", "triton"),
    "quantize": ("lief", "modelopt", "onnx_graphsurgeon", "onnxslim"),
    "server": ("PIL", "numpy", "onnxruntime", "pytriton", "tokenizers"),
    "tensorrt": ("cuda", "polygraphy", "tensorrt"),
}


def install(extra: str) -> str:
    """The command that installs an extra, or several with commas between them."""
    return f"`pip install -e '.[{extra}]'` in a clone of Blipstream"


@contextmanager
def needing(extra: str, error: type[BlipstreamError] = BlipstreamError, hint: str = "") -> Iterator[None]:
    """Say how to install an extra where one of its modules is imported and missing.

    Raises:
        BlipstreamError: of the kind ``error``; the message ends with ``hint``.
    """
    try:
        yield
    except ModuleNotFoundError as missing:
        modules = [module for name in extra.split(",") for module in _MODULES[name]]
        if missing.name is None or missing.name.partition(".")[0] not in modules:
            raise
        raise error(f"{missing.name} is not installed: {install(extra)} brings it{hint}") from None
