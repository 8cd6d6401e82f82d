"""Inference engines behind one interface.

:func:`create_engine` loads a graph by the engine's name in a bundle's manifest. :func:`load_decoder` turns the graphs
of a language model into what the decode loop needs, whatever its kind.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from blipstream.contract import DECODER_FILE, ENCODER_FILE, DecoderSection
from blipstream.engines.base import BoundRun, Engine, TensorInfo
from blipstream.engines.decoder import CachedDecoder, RowDecoder
from blipstream.engines.encoder_decoder import EncoderDecoder
from blipstream.errors import EngineError

__all__ = [
    "BoundRun",
    "CachedDecoder",
    "EncoderDecoder",
    "Engine",
    "RowDecoder",
    "TensorInfo",
    "create_engine",
    "load_decoder",
]


def _onnxruntime(path: Path, threads: int | None) -> Engine:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read at its import; the wheel reports to its maker otherwise
    from blipstream.engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(path, threads=threads)


_ENGINES: dict[str, Callable[[Path, int | None], Engine]] = {
    "onnxruntime": _onnxruntime,
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


def load_decoder(sizes: DecoderSection, load: Callable[[str], Engine]) -> RowDecoder:
    """The language model of a bundle, with its cache.

    Args:
        sizes: the manifest's section.
        load: loads one of its graphs, by the name of its file.

    Raises:
        EngineError: a graph is missing, cannot be loaded, or is not one of such a model.
    """
    if sizes.encoder is None:
        return CachedDecoder(load(DECODER_FILE), sizes)
    return EncoderDecoder(load(ENCODER_FILE), load(DECODER_FILE), sizes)
