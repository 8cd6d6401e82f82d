"""ONNX Runtime: on the CPU the engine that needs nothing but a wheel, on a GPU the one that needs no TensorRT."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from blipstream.engines.base import BoundRun, Engine, TensorInfo
from blipstream.engines.cache import CacheShape, KVCache
from blipstream.engines.memory import BFLOAT16, Array, DeviceArray, Tensor
from blipstream.errors import EngineError
from blipstream.extras import install, needing
from blipstream.paths import utf8_path

_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bfloat16)": BFLOAT16,
    "tensor(double)": np.dtype(np.float64),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(bool)": np.dtype(np.bool_),
}

_DEVICE = "cuda"
"""Name of a GPU's memory in an IO binding."""

_ONNX_BFLOAT16 = 16
"""TensorProto.BFLOAT16, by which an IO binding knows the type that NumPy lacks."""

_CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
"""TF32 rounds what a graph in fp32 multiplies; a search by trial would stop the server at each new batch size."""

_LOG_ERRORS = 3
"""Severity from which ONNX Runtime writes to standard error; what fails is raised as well."""


class OnnxRuntimeEngine(Engine):
    """An ONNX graph in an ONNX Runtime session, on the CPU.

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
            with utf8_path(path) as name:
                session = ort.InferenceSession(name, _options(threads, spin), providers=self._providers())
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise EngineError(f"ONNX Runtime cannot load {path}: {_first_line(error)}") from error
        self._session: ort.InferenceSession | None = session
        name = f"{path.parent.parent.name}/{path.name}" if path.parent.name.isdigit() else path.name
        super().__init__(name, _infos(session.get_inputs()), _infos(session.get_outputs()))

    def _providers(self) -> list[Any]:
        """What runs the graph's nodes, the first that can."""
        return ["CPUExecutionProvider"]

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        names = [info.name for info in self.outputs]
        try:
            results = self._open_session().run(names, dict(inputs))
        except EngineError:
            raise
        except Exception as error:
            raise _failed(self.name, error) from error
        return dict(zip(names, results, strict=True))

    def _bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> BoundRun:
        return _OrtBoundRun(self.name, self._open_session(), inputs, outputs)

    def _open_session(self) -> ort.InferenceSession:
        if self._session is None:
            raise EngineError(f"{self.name}: the engine is closed")
        return self._session

    def close(self) -> None:
        """Release the session; bound runs keep theirs until they are dropped."""
        self._session = None


class OnnxRuntimeCudaEngine(OnnxRuntimeEngine):
    """An ONNX graph in an ONNX Runtime session on a GPU. What is bound on the GPU stays there.

    Args:
        path: as of :class:`OnnxRuntimeEngine`.
        threads: of what is left to the CPU.

    Raises:
        EngineError: as :class:`OnnxRuntimeEngine`, or there is no GPU, or the installed ONNX Runtime knows none.
    """

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        self._cuda = load_cuda()
        super().__init__(path, threads=threads)
        self._stream = self._cuda.Stream()

    def allocate(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Tensor:
        """See :meth:`Engine.allocate`."""
        array: Tensor = self._cuda.allocate(shape, dtype)
        return array

    def allocate_host(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
        """See :meth:`Engine.allocate_host`."""
        array: Array = self._cuda.allocate_pinned(shape, dtype)
        return array

    def copy_to_host(self, source: Tensor, target: Array) -> None:
        """See :meth:`Engine.copy_to_host`."""
        self._cuda.copy_to_host(self._stream, source, target)

    def _make_cache(self, shape: CacheShape, dtype: np.dtype[Any]) -> KVCache:
        cache: KVCache = self._cuda.DeviceKVCache(shape, dtype, self._stream)
        return cache

    def _providers(self) -> list[Any]:
        return [("CUDAExecutionProvider", _CUDA_OPTIONS), *super()._providers()]


def load_cuda() -> Any:
    """The module of CUDA's memory, once it is clear that ONNX Runtime and this machine have what it takes.

    Raises:
        EngineError: they do not.
    """
    providers = ort.get_available_providers()
    if "CUDAExecutionProvider" not in providers:
        raise EngineError(
            f"the installed onnxruntime {ort.__version__} has {', '.join(providers)}, and CUDAExecutionProvider is "
            f"needed, in place of onnxruntime: {install('cuda')} brings it"
        )
    with needing("cuda", EngineError):
        from blipstream.engines import cuda
    cuda.check_device()
    return cuda


class _OrtBoundRun:
    """A session with an IO binding; it holds the arrays, whose memory the binding knows by address alone."""

    def __init__(
        self, name: str, session: ort.InferenceSession, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> None:
        self._name = name
        self._session = session
        self._arrays = (*inputs.values(), *outputs.values())
        self._on_device = any(isinstance(array, DeviceArray) for array in self._arrays)
        self._binding = session.io_binding()
        for key, tensor in inputs.items():
            self._binding.bind_input(key, *_place(tensor))
        for key, tensor in outputs.items():
            self._binding.bind_output(key, *_place(tensor))

    def run(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
            if self._on_device:
                self._binding.synchronize_outputs()
        except Exception as error:
            raise _failed(self._name, error) from error


def _place(tensor: Tensor) -> tuple[str, int, Any, tuple[int, ...], int]:
    """Device, its number, type, shape and address of a tensor, as an IO binding wants them."""
    type_ = _ONNX_BFLOAT16 if tensor.dtype == BFLOAT16 else tensor.dtype.type
    if isinstance(tensor, DeviceArray):
        return _DEVICE, 0, type_, tensor.shape, tensor.address
    return "cpu", 0, type_, tensor.shape, tensor.ctypes.data


def _options(threads: int | None, spin: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    # a pair of QuantizeLinear and DequantizeLinear means what it says: fused, its products saturate without VNNI
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = _LOG_ERRORS
    return options


def _infos(nodes: list[Any]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(node.name, _DTYPES[node.type], tuple(node.shape)) for node in nodes)


def _failed(name: str, error: Exception) -> EngineError:
    return EngineError(f"{name}: the run failed: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
