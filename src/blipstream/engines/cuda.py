"""The CUDA runtime, as far as engines need it: memory of the device, page-locked memory of the host, one stream.

Source of the calls: the CUDA runtime's API reference; the bindings are NVIDIA's own (``cuda-bindings``).
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda.bindings import runtime

from blipstream.engines.cache import CacheShape, KVCache
from blipstream.engines.memory import Array, DeviceArray, Tensor
from blipstream.errors import EngineError


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of the runtime; return what it gives beside its status.

    Raises:
        EngineError: it failed; the message is CUDA's.
    """
    status, *results = function(*arguments)
    if status != runtime.cudaError_t.cudaSuccess:
        _, text = runtime.cudaGetErrorString(status)
        raise EngineError(f"{function.__name__} failed: {text.decode()}")
    return results[0] if len(results) == 1 else results


def check_device() -> None:
    """See that there is a GPU that this process can use: the first that ``CUDA_VISIBLE_DEVICES`` shows.

    Raises:
        EngineError: there is none, or its driver is too old.
    """
    try:
        count = call(runtime.cudaGetDeviceCount)
    except EngineError as error:
        raise EngineError(f"an engine for a GPU needs an NVIDIA GPU and its driver, but {error}") from None
    if not count:
        raise EngineError("an engine for a GPU needs an NVIDIA GPU, and this process sees none")


def compute_capability() -> str:
    """Of the GPU in use, as in ``"9.0"``."""
    attribute = runtime.cudaDeviceAttr
    parts = (attribute.cudaDevAttrComputeCapabilityMajor, attribute.cudaDevAttrComputeCapabilityMinor)
    return ".".join(str(call(runtime.cudaDeviceGetAttribute, part, 0)) for part in parts)


def multiprocessors() -> int:
    """How many the GPU in use has."""
    return int(call(runtime.cudaDeviceGetAttribute, runtime.cudaDeviceAttr.cudaDevAttrMultiProcessorCount, 0))


def device_name() -> str:
    """Of the GPU in use, as its driver names it."""
    name: bytes = call(runtime.cudaGetDeviceProperties, 0).name
    return name.split(b"\0", 1)[0].decode()


class _Allocation:
    """Memory of the device; it is freed with the last object that holds it."""

    def __init__(self, num_bytes: int) -> None:
        self.address = int(call(runtime.cudaMalloc, num_bytes))
        weakref.finalize(self, runtime.cudaFree, self.address)


def allocate(shape: Sequence[int], dtype: npt.DTypeLike) -> DeviceArray:
    """An array in the memory of the device; its contents are undefined.

    Raises:
        EngineError: there is not so much memory left; the message says how much is.
    """
    dtype = np.dtype(dtype)
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        memory = _Allocation(max(num_bytes, 1))
    except EngineError as error:
        free, total = call(runtime.cudaMemGetInfo)
        raise EngineError(
            f"{num_bytes} bytes of GPU memory were asked for, and {free} of {total} are free: {error}"
        ) from None
    return DeviceArray(memory.address, tuple(shape), dtype, memory)


def allocate_pinned(shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
    """An array of zeros in page-locked memory of the host, which the device reads and writes by itself.

    Raises:
        EngineError: there is not so much memory that could be locked.
    """
    dtype = np.dtype(dtype)
    num_bytes = max(math.prod(shape) * dtype.itemsize, 1)
    address = int(call(runtime.cudaMallocHost, num_bytes))
    memory = (ctypes.c_uint8 * num_bytes).from_address(address)
    weakref.finalize(memory, runtime.cudaFreeHost, address)
    array: Array = np.ndarray(tuple(shape), dtype, buffer=memory)  # type: ignore[arg-type]  # as good as an array
    array.fill(0)
    return array


def is_pinned(array: Array) -> bool:
    """Whether an array of the host lies in page-locked memory."""
    attributes = call(runtime.cudaPointerGetAttributes, array.ctypes.data)
    return bool(attributes.type == runtime.cudaMemoryType.cudaMemoryTypeHost)


class Stream:
    """A stream of the device: what is enqueued runs in its order, beside the host."""

    def __init__(self) -> None:
        self._stream = call(runtime.cudaStreamCreateWithFlags, runtime.cudaStreamNonBlocking)
        self.handle = int(self._stream)
        weakref.finalize(self, runtime.cudaStreamDestroy, self._stream)

    def copy_in(self, device: DeviceArray, host: Array) -> None:
        """Enqueue a copy from the host to the device; both are contiguous and of one size."""
        kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        call(runtime.cudaMemcpyAsync, device.address, host.ctypes.data, host.nbytes, kind, self._stream)

    def copy_out(self, host: Array, device: DeviceArray) -> None:
        """Enqueue a copy from the device to the host; both are contiguous and of one size."""
        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        call(runtime.cudaMemcpyAsync, host.ctypes.data, device.address, host.nbytes, kind, self._stream)

    def copy_blocks(
        self, target: int, target_pitch: int, source: int, source_pitch: int, size: int, count: int
    ) -> None:
        """Enqueue copies of ``count`` blocks of ``size`` bytes within the device.

        Args:
            target: address of the first block.
            target_pitch: bytes from one block to the next.
            source: as ``target``.
            source_pitch: as ``target_pitch``.
            size: bytes of a block.
            count: of blocks.
        """
        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        call(runtime.cudaMemcpy2DAsync, target, target_pitch, source, source_pitch, size, count, kind, self._stream)

    def synchronize(self) -> None:
        """Wait until all that was enqueued has run.

        Raises:
            EngineError: something of it failed.
        """
        call(runtime.cudaStreamSynchronize, self._stream)

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """Record what ``enqueue`` enqueues on this stream, without running it."""
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call(runtime.cudaStreamBeginCapture, self._stream, mode)
        try:
            enqueue()
        finally:
            graph = call(runtime.cudaStreamEndCapture, self._stream)
        return Graph(graph, self._stream)


def copy_to_host(stream: Stream, source: Tensor, target: Array) -> None:
    """Copy an array of the device, or of the host, into one of the host, and wait until it is there."""
    if isinstance(source, DeviceArray):
        stream.copy_out(target, source)
        stream.synchronize()
    else:
        np.copyto(target, source)


class Graph:
    """What a stream has recorded, to be enqueued at once, with the addresses of the recording."""

    def __init__(self, graph: Any, stream: Any) -> None:
        self._stream = stream
        try:
            self._graph = call(runtime.cudaGraphInstantiate, graph, 0)
        finally:
            runtime.cudaGraphDestroy(graph)
        weakref.finalize(self, runtime.cudaGraphExecDestroy, self._graph)

    def launch(self) -> None:
        """Enqueue it on the stream that recorded it."""
        call(runtime.cudaGraphLaunch, self._graph, self._stream)


class DeviceKVCache(KVCache):
    """A KV cache in the memory of the device. All of it is allocated at once."""

    def __init__(self, shape: CacheShape, dtype: npt.DTypeLike, stream: Stream) -> None:
        self._shape = shape
        self._stream = stream
        self._tensors = [allocate(shape.tensor, dtype) for _ in range(2 * shape.num_layers)]
        self._token_bytes = shape.head_dim * np.dtype(dtype).itemsize
        for tensor in self._tensors:  # a step reads all of a row and masks what was never written: 0 * NaN is NaN
            call(runtime.cudaMemset, tensor.address, 0, tensor.nbytes)

    def rows(self, first: int, count: int) -> list[DeviceArray]:
        """See :meth:`KVCache.rows`."""
        return [tensor.rows(first, count) for tensor in self._tensors]

    def move_row(self, source: int, target: int, length: int) -> None:
        """See :meth:`KVCache.move_row`."""
        pitch, size = self._shape.max_tokens * self._token_bytes, length * self._token_bytes
        for tensor in self._tensors:
            read, written = tensor.rows(source, 1).address, tensor.rows(target, 1).address
            self._stream.copy_blocks(written, pitch, read, pitch, size, self._shape.num_heads)
        self._stream.synchronize()

    def write(self, first: int, tensors: Sequence[Tensor]) -> None:
        """See :meth:`KVCache.write`; the tensors are the device's too."""
        pitch = self._shape.max_tokens * self._token_bytes
        for tensor, written in zip(self._tensors, tensors, strict=True):
            if not isinstance(written, DeviceArray):
                raise EngineError("a cache on a GPU is written from its own memory, but was given an array of the host")
            count, num_heads, length, _ = written.shape
            size = length * self._token_bytes
            self._stream.copy_blocks(
                tensor.rows(first, 1).address, pitch, written.address, size, size, count * num_heads
            )
        self._stream.synchronize()
