"""ONNX Runtime on the CPU: the engine that needs nothing but a wheel."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from blipstream.engines.base import Array, BoundRun, Engine, TensorInfo
from blipstream.errors import EngineError

_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}

_LOG_ERRORS = 3
"""Severity from which ONNX Runtime writes to standard error; what fails is raised as well."""


class OnnxRuntimeEngine(Engine):
    """An ONNX graph in an ONNX Runtime session on the CPU.

    Args:
        path: the ``.onnx`` file; external data is found beside it.
        threads: threads of one operator (the calling thread is one of them); all cores of this process by default.
        spin: let idle threads wait actively. It shortens a single run slightly and costs the cores of whoever else
            computes on this machine, such as the other engines of a bundle.

    Raises:
        EngineError: no such file, or ONNX Runtime cannot load it.
    """

    def __init__(self, path: Path, *, threads: int | None = None, spin: bool = False) -> None:
        if not path.is_file():
            raise EngineError(f"there is no ONNX graph at {path}")
        try:
            session = ort.InferenceSession(str(path), _options(threads, spin), providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise EngineError(f"ONNX Runtime cannot load {path}: {_first_line(error)}") from error
        self._session: ort.InferenceSession | None = session
        name = f"{path.parent.parent.name}/{path.name}" if path.parent.name.isdigit() else path.name
        super().__init__(name, _infos(session.get_inputs()), _infos(session.get_outputs()))

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        names = [info.name for info in self.outputs]
        try:
            results = self._open_session().run(names, dict(inputs))
        except EngineError:
            raise
        except Exception as error:
            raise _failed(self.name, error) from error
        return dict(zip(names, results, strict=True))

    def _bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> BoundRun:
        return _OrtBoundRun(self.name, self._open_session(), inputs, outputs)

    def _open_session(self) -> ort.InferenceSession:
        if self._session is None:
            raise EngineError(f"{self.name}: the engine is closed")
        return self._session

    def close(self) -> None:
        """Release the session; bound runs keep theirs until they are dropped."""
        self._session = None


class _OrtBoundRun:
    """A session with an IO binding; it holds the arrays, whose memory the binding knows by address alone."""

    def __init__(
        self, name: str, session: ort.InferenceSession, inputs: Mapping[str, Array], outputs: Mapping[str, Array]
    ) -> None:
        self._name = name
        self._session = session
        self._arrays = (*inputs.values(), *outputs.values())
        self._binding = session.io_binding()
        for key, array in inputs.items():
            self._binding.bind_input(key, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for key, array in outputs.items():
            self._binding.bind_output(key, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def run(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise _failed(self._name, error) from error


def _options(threads: int | None, spin: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    options.log_severity_level = _LOG_ERRORS
    return options


def _infos(nodes: list[Any]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(node.name, np.dtype(_DTYPES[node.type]), tuple(node.shape)) for node in nodes)


def _failed(name: str, error: Exception) -> EngineError:
    return EngineError(f"{name}: the run failed: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
