"""Inference engines behind one interface.

:func:`create_engine` loads a graph by the engine's name in a bundle's manifest. :func:`load_decoder` turns the graphs
of a language model into what the decode loop needs, whatever its kind.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from blipstream.contract import DECODER_FILE, ENCODER_FILE
from blipstream.engines.base import BoundRun, Engine, TensorInfo
from blipstream.engines.decoder import CachedDecoder, RowDecoder
from blipstream.engines.encoder_decoder import EncoderDecoder
from blipstream.engines.platform import check_platform
from blipstream.errors import EngineError
from blipstream.extras import needing
from blipstream.manifest import DecoderSection, Manifest

__all__ = [
    "BoundRun",
    "CachedDecoder",
    "EncoderDecoder",
    "Engine",
    "RowDecoder",
    "TensorInfo",
    "check_onnxruntime_cuda",
    "create_engine",
    "load_decoder",
    "open_engine",
]


def _onnxruntime(path: Path, threads: int | None) -> Engine:
    _silence_onnxruntime()
    from blipstream.engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(path, threads=threads)


def _onnxruntime_cuda(path: Path, threads: int | None) -> Engine:
    _silence_onnxruntime()
    from blipstream.engines.onnxruntime import OnnxRuntimeCudaEngine

    return OnnxRuntimeCudaEngine(path, threads=threads)


def check_onnxruntime_cuda() -> None:
    """See that ``onnxruntime-cuda`` can run here.

    Raises:
        EngineError: there is no GPU, or the installed ONNX Runtime knows none.
    """
    _silence_onnxruntime()
    from blipstream.engines.onnxruntime import load_cuda

    load_cuda()


def _silence_onnxruntime() -> None:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read at its import; the wheel reports to its maker otherwise


def _tensorrt(path: Path, threads: int | None) -> Engine:
    del threads  # nothing of it runs on the CPU
    with needing("tensorrt", EngineError):
        from blipstream.engines.tensorrt import TensorRTEngine
    return TensorRTEngine(path)


_ENGINES: dict[str, Callable[[Path, int | None], Engine]] = {
    "onnxruntime": _onnxruntime,
    "onnxruntime-cuda": _onnxruntime_cuda,
    "tensorrt": _tensorrt,
}


def create_engine(name: str, path: Path, *, threads: int | None = None) -> Engine:
    """Load the graph at ``path`` with the engine called ``name`` (``Manifest.engine``).

    Args:
        name: a name that a manifest may hold.
        path: the graph's file.
        threads: CPU threads of one run; all cores of this process by default.

    Raises:
        EngineError: no engine of that name, or the graph cannot be loaded.
    """
    if name not in _ENGINES:
        raise EngineError(f"there is no engine called {name!r}; this version knows {', '.join(_ENGINES)}")
    return _ENGINES[name](path, threads)


def open_engine(manifest: Manifest, folder: Path, graph: str, *, threads: int | None = None) -> Engine:
    """Load a graph of a bundle with the bundle's engine.

    Args:
        manifest: the bundle's.
        folder: version folder of the graph's model.
        graph: name of its file in a bundle for ONNX Runtime.
        threads: as of :func:`create_engine`.

    Raises:
        EngineError: the graph is missing, cannot be loaded, or was built for another GPU or another TensorRT.
    """
    if manifest.plans is not None:
        check_platform(manifest.plans, *_tensorrt_here())
    return create_engine(manifest.engine, folder / manifest.graph_file(graph), threads=threads)


def _tensorrt_here() -> tuple[str, str, str]:
    """TensorRT's version, the GPU's name and its compute capability."""
    with needing("tensorrt", EngineError):
        import tensorrt

        from blipstream.engines import cuda
    cuda.check_device()
    return tensorrt.__version__, cuda.device_name(), cuda.compute_capability()


def load_decoder(sizes: DecoderSection, load: Callable[[str], Engine], prefix_bytes: int = 0) -> RowDecoder:
    """The language model of a bundle, with its cache.

    Args:
        sizes: the manifest's section.
        load: loads one of its graphs, by the name of its file.
        prefix_bytes: budget of the prefixes that a decoder-only model keeps.

    Raises:
        EngineError: a graph is missing, cannot be loaded, or is not one of such a model.
    """
    if sizes.encoder is None:
        return CachedDecoder(load(DECODER_FILE), sizes, prefix_bytes)
    return EncoderDecoder(load(ENCODER_FILE), load(DECODER_FILE), sizes)
