"""TensorRT: engines that were built for one GPU, run on device memory, a decode step as one CUDA graph.

Source of the calls: TensorRT's Python API reference, and its developer guide on CUDA graphs: a captured graph holds
what its execution context held, so that each has a context of its own; the contexts of an engine share the memory of
their activations, since one runs at a time.
"""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorrt as trt

from blipstream.engines import cuda
from blipstream.engines.base import BoundRun, Engine, TensorInfo
from blipstream.engines.cache import CacheShape, KVCache
from blipstream.engines.memory import BFLOAT16, Array, DeviceArray, Tensor
from blipstream.errors import EngineError

_LOG = logging.getLogger(__name__)

_DTYPES: dict[trt.DataType, np.dtype[Any]] = {
    trt.DataType.FLOAT: np.dtype(np.float32),
    trt.DataType.HALF: np.dtype(np.float16),
    trt.DataType.BF16: BFLOAT16,
    trt.DataType.INT64: np.dtype(np.int64),
    trt.DataType.INT32: np.dtype(np.int32),
    trt.DataType.INT8: np.dtype(np.int8),
    trt.DataType.UINT8: np.dtype(np.uint8),
    trt.DataType.BOOL: np.dtype(np.bool_),
}

Shape = tuple[int, ...]


class Logger(trt.ILogger):  # type: ignore[misc]  # TensorRT has no stubs
    """Hands what TensorRT says to :mod:`logging`, and keeps its last error for the exception that follows."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self._error = ""

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        """Called by TensorRT."""
        if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
            self._error = msg
        elif severity == trt.ILogger.Severity.WARNING:
            _LOG.warning("TensorRT: %s", msg)
        else:
            _LOG.debug("TensorRT: %s", msg)

    def take_error(self) -> str:
        """The last error, which is forgotten then."""
        error, self._error = self._error or "TensorRT did not say why", ""
        return error


@dataclass(frozen=True)
class Profile:
    """Which shapes the inputs of an engine may have, together.

    Attributes:
        index: the engine's number of it.
        ranges: the smallest and the largest shape of each input.
    """

    index: int
    ranges: Mapping[str, tuple[Shape, Shape]]

    def takes(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether all inputs may have these shapes."""
        return all(
            len(shape) == len(low) and all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))
            for (low, high), shape in ((self.ranges[name], shape) for name, shape in shapes.items())
        )

    def __str__(self) -> str:
        """As in an error: each input with its smallest and largest shape."""
        return ", ".join(f"{name} {list(low)} to {list(high)}" for name, (low, high) in self.ranges.items())


class TensorRTEngine(Engine):
    """A serialized TensorRT engine (a *plan*) on the GPU that this process sees first.

    Args:
        path: of the plan.

    Raises:
        EngineError: no such file, no GPU, or TensorRT does not load it, as it does not load what was built by another
            version or for another GPU.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise EngineError(f"there is no TensorRT engine at {path}")
        cuda.check_device()
        self._logger = Logger()
        self._runtime = trt.Runtime(self._logger)
        self._runtime.engine_host_code_allowed = True  # version-compatible plans carry TensorRT's own runtime
        self._engine = self._load(path)
        self._lock = threading.Lock()
        self._stream = cuda.Stream()
        self._scratch: DeviceArray | None = None
        self._contexts: dict[int, trt.IExecutionContext] = {}
        self._staging: dict[str, tuple[Array, DeviceArray]] = {}
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        inputs = [name for name in names if modes[name] == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if modes[name] == trt.TensorIOMode.OUTPUT]
        aliases = {name: self._engine.get_aliased_input_tensor(name) for name in outputs}
        self._aliases = {output: name for output, name in aliases.items() if name}  # caches, updated in place
        self._profiles = self._read_profiles(inputs)
        super().__init__(f"{path.parent.parent.name}/{path.name}", self._infos(inputs), self._infos(outputs))

    def allocate(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Tensor:
        """See :meth:`Engine.allocate`."""
        return cuda.allocate(shape, dtype)

    def allocate_host(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
        """See :meth:`Engine.allocate_host`: page-locked, so that a CUDA graph may copy it."""
        return cuda.allocate_pinned(shape, dtype)

    def copy_to_host(self, source: Tensor, target: Array) -> None:
        """See :meth:`Engine.copy_to_host`."""
        with self._lock:
            cuda.copy_to_host(self._stream, source, target)

    def close(self) -> None:
        """Release the engine and its memory; bound runs keep theirs until they are dropped."""
        self._contexts.clear()
        self._staging.clear()
        self._scratch = self._engine = None

    def _make_cache(self, shape: CacheShape, dtype: np.dtype[Any]) -> KVCache:
        return cuda.DeviceKVCache(shape, dtype, self._stream)

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Through page-locked staging of this engine's own, which grows with the largest batch."""
        with self._lock:
            shapes = {name: array.shape for name, array in inputs.items()}
            context = self._context(self._choose(shapes))
            self._set_shapes(context, shapes)
            types = {info.name: info.dtype for info in (*self.inputs, *self.outputs)}
            shapes |= {info.name: tuple(context.get_tensor_shape(info.name)) for info in self.outputs}
            staged = {name: self._staged(name, shape, types[name]) for name, shape in shapes.items()}
            hosts = {name: host for name, (host, _) in staged.items()}
            devices = {name: device for name, (_, device) in staged.items()}
            devices |= {output: devices[name] for output, name in self._aliases.items()}
            for name, array in inputs.items():
                np.copyto(hosts[name], array)
            results = {info.name: hosts[info.name] for info in self.outputs}
            _Run(self, {name: hosts[name] for name in inputs}, results, devices).run_once(context)
            return {name: array.copy() for name, array in results.items()}

    def _bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> BoundRun:
        return _Run(self, inputs, outputs)

    # --- what a run needs ----------------------------------------------------------------------------------------

    def _load(self, path: Path) -> Any:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineError(
                f"TensorRT {trt.__version__} on {cuda.device_name()} cannot load {path}: {self._logger.take_error()}"
            )
        return engine

    def _infos(self, names: Sequence[str]) -> tuple[TensorInfo, ...]:
        infos = []
        for name in names:
            shape = tuple(None if size < 0 else size for size in self._engine.get_tensor_shape(name))
            infos.append(TensorInfo(name, _DTYPES[self._engine.get_tensor_dtype(name)], shape))
        return tuple(infos)

    def _read_profiles(self, inputs: Sequence[str]) -> list[Profile]:
        profiles = []
        for index in range(self._engine.num_optimization_profiles):
            shapes = {name: self._engine.get_tensor_profile_shape(name, index) for name in inputs}
            profiles.append(
                Profile(index, {name: (tuple(low), tuple(high)) for name, (low, _, high) in shapes.items()})
            )
        return profiles

    def _choose(self, shapes: Mapping[str, Shape]) -> int:
        """Number of the first profile that takes the inputs' shapes."""
        for profile in self._profiles:
            if profile.takes(shapes):
                return profile.index
        given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        built = "; or ".join(map(str, self._profiles))
        raise EngineError(f"{self.name} was not built for the shapes {given}: expected {built}")

    def _context(self, profile: int) -> trt.IExecutionContext:
        """The context of a profile that single runs share."""
        if profile not in self._contexts:
            self._contexts[profile] = self._make_context(profile)
        return self._contexts[profile]

    def _make_context(self, profile: int) -> trt.IExecutionContext:
        if self._engine is None:
            raise EngineError(f"{self.name}: the engine is closed")
        context = self._engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise EngineError(f"{self.name}: no execution context can be made: {self._logger.take_error()}")
        if self._scratch is None:
            self._scratch = cuda.allocate((self._engine.device_memory_size_v2,), np.uint8)
        context.set_device_memory(self._scratch.address, self._scratch.nbytes)
        self._require(context.set_optimization_profile_async(profile, self._stream.handle), "the profile was refused")
        self._stream.synchronize()
        return context

    def _set_shapes(self, context: trt.IExecutionContext, shapes: Mapping[str, Shape]) -> None:
        for name, shape in shapes.items():
            self._require(context.set_input_shape(name, shape), f"the shape {list(shape)} of {name} was refused")

    def _require(self, done: bool, what: str) -> None:
        if not done:
            raise EngineError(f"{self.name}: {what}: {self._logger.take_error()}")

    def _staged(self, name: str, shape: Shape, dtype: np.dtype[Any]) -> tuple[Array, DeviceArray]:
        """Page-locked memory, and memory of the device, for a tensor of a single run; both grow with what is asked."""
        size = int(np.prod(shape))
        if name not in self._staging or size > self._staging[name][0].size:
            self._staging[name] = cuda.allocate_pinned((size,), dtype), cuda.allocate((size,), dtype)
        host, device = self._staging[name]
        return host[:size].reshape(shape), replace(device, shape=shape)


class _Run:
    """A run with fixed memory. What is run twice is run from then on as one CUDA graph, with the copies in it.

    Args:
        engine: the engine.
        inputs: what it reads; what lies on the host is copied to the device first.
        outputs: what it writes; what lies on the host is copied there last.
        devices: memory of the device for what lies on the host; by default it is allocated.
    """

    def __init__(
        self,
        engine: TensorRTEngine,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        devices: Mapping[str, DeviceArray] | None = None,
    ) -> None:
        self._engine = engine
        self._shapes = {name: tensor.shape for name, tensor in inputs.items()}
        self._profile = engine._choose(self._shapes)
        self._addresses: dict[str, int] = {}
        self._copies_in = self._place(inputs, devices)
        self._copies_out = self._place(outputs, devices)
        self._tensors = (inputs, outputs)  # kept alive: the device knows them by address alone
        hosts = [host for host, _ in (*self._copies_in, *self._copies_out)]
        self._capturable = devices is None and all(map(cuda.is_pinned, hosts))
        self._runs = 0
        self._graph: cuda.Graph | None = None

    def run(self) -> None:
        """See :class:`~blipstream.engines.base.BoundRun`."""
        with self._engine._lock:
            if self._graph is None and self._runs and self._capturable:
                self._graph = self._capture()
            if self._graph is None:
                self.run_once(self._engine._context(self._profile))
            else:
                self._graph.launch()
                self._engine._stream.synchronize()
            self._runs += 1

    def run_once(self, context: trt.IExecutionContext) -> None:
        """Run in a context, launch by launch. The caller holds the engine's lock."""
        self._prepare(context)
        self._enqueue(context)
        self._engine._stream.synchronize()

    def _place(
        self, tensors: Mapping[str, Tensor], devices: Mapping[str, DeviceArray] | None
    ) -> list[tuple[Array, DeviceArray]]:
        """Note where the device finds each tensor; return those of the host, each with its place on the device."""
        copies = []
        for name, tensor in tensors.items():
            if isinstance(tensor, DeviceArray):
                device = tensor
            else:
                device = devices[name] if devices else cuda.allocate(tensor.shape, tensor.dtype)
                copies.append((tensor, device))
            self._addresses[name] = device.address
        return copies

    def _capture(self) -> cuda.Graph:
        """The run in a context of its own: once for real, as TensorRT asks for before a capture, and once recorded.

        The run for real is of the inputs that are bound now, since it writes the cache; the graph will repeat it.
        """
        context = self._engine._make_context(self._profile)
        self._captured = context, self._engine._scratch  # kept alive: the graph knows their memory by address alone
        self.run_once(context)
        return self._engine._stream.capture(lambda: self._enqueue(context))

    def _prepare(self, context: trt.IExecutionContext) -> None:
        self._engine._set_shapes(context, self._shapes)
        for name, address in self._addresses.items():
            self._engine._require(context.set_tensor_address(name, address), f"the address of {name} was refused")

    def _enqueue(self, context: trt.IExecutionContext) -> None:
        stream = self._engine._stream
        for host, device in self._copies_in:
            stream.copy_in(device, host)
        self._engine._require(context.execute_async_v3(stream.handle), "the run failed")
        for host, device in self._copies_out:
            stream.copy_out(host, device)
