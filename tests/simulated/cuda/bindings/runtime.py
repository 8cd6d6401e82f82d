"""The CUDA runtime on a machine without a GPU: the host plays the device.

Device memory is memory of the host that is full of NaN when it is allocated. What is enqueued on a stream runs when the
stream is synchronized and not before, so that a missing synchronization shows; what is captured does not run, and its
addresses are those of the capture. Copies between addresses that nobody allocated are errors, as they are on a GPU.
"""

from __future__ import annotations

import ctypes
import enum
import os
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

Task = Callable[[], None]


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100
    cudaErrorLaunchFailure = 719
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaMemoryType(enum.IntEnum):
    cudaMemoryTypeUnregistered = 0
    cudaMemoryTypeHost = 1
    cudaMemoryTypeDevice = 2


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


class cudaDeviceAttr(enum.IntEnum):
    cudaDevAttrMultiProcessorCount = 16
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


cudaStreamNonBlocking = 1

OK = cudaError_t.cudaSuccess
INVALID = cudaError_t.cudaErrorInvalidValue
CAPABILITY = (9, 0)
MULTIPROCESSORS = 132
NAME = b"Simulated GPU\0\0"


class _Memory:
    """All that is allocated, by address."""

    def __init__(self) -> None:
        self.limit = int(os.environ.get("SIMULATED_GPU_BYTES", 4 << 30))
        self.blocks: dict[int, tuple[Any, int, cudaMemoryType]] = {}

    def allocate(self, size: int, kind: cudaMemoryType) -> int | None:
        if kind == cudaMemoryType.cudaMemoryTypeDevice and size > self.free():
            return None
        block = (ctypes.c_uint8 * size)()
        ctypes.memset(block, 0xFF, size)
        address = ctypes.addressof(block)
        self.blocks[address] = (block, size, kind)
        return address

    def free(self) -> int:
        used = sum(size for _, size, kind in self.blocks.values() if kind == cudaMemoryType.cudaMemoryTypeDevice)
        return self.limit - used

    def kind(self, address: int, size: int = 1) -> cudaMemoryType:
        for start, (_, length, kind) in self.blocks.items():
            if start <= address and address + size <= start + length:
                return kind
        return cudaMemoryType.cudaMemoryTypeUnregistered

    def is_device(self, address: int, size: int) -> bool:
        return self.kind(address, size) == cudaMemoryType.cudaMemoryTypeDevice


class _Stream:
    """A queue of tasks; while it captures, they go to a graph."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.captured: list[Task] | None = None

    def __int__(self) -> int:
        return id(self)

    def add(self, task: Task) -> None:
        (self.tasks if self.captured is None else self.captured).append(task)


_memory = _Memory()
_streams: dict[int, _Stream] = {}


class LaunchError(Exception):
    """A task failed on the device: the stream reports it when it is synchronized."""


def enqueue(stream: int, task: Task) -> None:
    """For what else runs on the device: add a task to a stream."""
    _streams[stream].add(task)


def is_device(address: int, size: int) -> bool:
    """For what else runs on the device: whether it may read and write there."""
    return _memory.is_device(address, size)


def cudaGetErrorString(error: cudaError_t) -> tuple[cudaError_t, bytes]:
    return OK, {
        cudaError_t.cudaErrorInvalidValue: b"invalid argument",
        cudaError_t.cudaErrorMemoryAllocation: b"out of memory",
        cudaError_t.cudaErrorNoDevice: b"no CUDA-capable device is detected",
        cudaError_t.cudaErrorLaunchFailure: b"unspecified launch failure",
    }.get(error, error.name.encode())


def cudaGetDeviceCount() -> tuple[Any, ...]:
    count = int(os.environ.get("SIMULATED_GPUS", "1"))
    return (OK, count) if count else (cudaError_t.cudaErrorNoDevice, None)


def cudaDeviceGetAttribute(attr: cudaDeviceAttr, device: int) -> tuple[Any, ...]:
    if attr == cudaDeviceAttr.cudaDevAttrMultiProcessorCount:
        return OK, MULTIPROCESSORS
    return OK, CAPABILITY[attr - cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor]


def cudaGetDeviceProperties(device: int) -> tuple[Any, ...]:
    return OK, SimpleNamespace(name=NAME)


def cudaMemGetInfo() -> tuple[Any, ...]:
    return OK, _memory.free(), _memory.limit


def cudaMalloc(size: int) -> tuple[Any, ...]:
    address = _memory.allocate(size, cudaMemoryType.cudaMemoryTypeDevice)
    return (OK, address) if address is not None else (cudaError_t.cudaErrorMemoryAllocation, None)


def cudaMallocHost(size: int) -> tuple[Any, ...]:
    return OK, _memory.allocate(size, cudaMemoryType.cudaMemoryTypeHost)


def cudaFree(devPtr: int) -> tuple[cudaError_t]:
    return _free(devPtr, cudaMemoryType.cudaMemoryTypeDevice)


def cudaFreeHost(ptr: int) -> tuple[cudaError_t]:
    return _free(ptr, cudaMemoryType.cudaMemoryTypeHost)


def _free(address: int, kind: cudaMemoryType) -> tuple[cudaError_t]:
    if address not in _memory.blocks or _memory.blocks[address][2] != kind:
        return (INVALID,)
    del _memory.blocks[address]
    return (OK,)


def cudaPointerGetAttributes(ptr: int) -> tuple[Any, ...]:
    return OK, SimpleNamespace(type=_memory.kind(ptr))


def cudaMemset(devPtr: int, value: int, count: int) -> tuple[cudaError_t]:
    if not _memory.is_device(devPtr, count):
        return (INVALID,)
    ctypes.memset(devPtr, value, count)
    return (OK,)


def cudaStreamCreateWithFlags(flags: int) -> tuple[Any, ...]:
    stream = _Stream()
    _streams[int(stream)] = stream
    return OK, stream


def cudaStreamDestroy(stream: _Stream) -> tuple[cudaError_t]:
    del _streams[int(stream)]
    return (OK,)


def cudaStreamSynchronize(stream: _Stream) -> tuple[cudaError_t]:
    if stream.captured is not None:
        return (cudaError_t.cudaErrorStreamCaptureInvalidated,)
    tasks, stream.tasks = stream.tasks, []
    try:
        for task in tasks:
            task()
    except LaunchError:
        return (cudaError_t.cudaErrorLaunchFailure,)
    return (OK,)


def cudaMemcpyAsync(dst: int, src: int, count: int, kind: cudaMemcpyKind, stream: _Stream) -> tuple[cudaError_t]:
    return cudaMemcpy2DAsync(dst, count, src, count, count, 1, kind, stream)


def cudaMemcpy2DAsync(
    dst: int, dpitch: int, src: int, spitch: int, width: int, height: int, kind: cudaMemcpyKind, stream: _Stream
) -> tuple[cudaError_t]:
    written, read = (height - 1) * dpitch + width, (height - 1) * spitch + width
    host, host_size = (src, read) if kind == cudaMemcpyKind.cudaMemcpyHostToDevice else (dst, written)
    devices = {
        cudaMemcpyKind.cudaMemcpyHostToDevice: [(dst, written)],
        cudaMemcpyKind.cudaMemcpyDeviceToHost: [(src, read)],
        cudaMemcpyKind.cudaMemcpyDeviceToDevice: [(dst, written), (src, read)],
    }[kind]
    if width > min(dpitch, spitch) or not all(_memory.is_device(*place) for place in devices):
        return (INVALID,)
    pageable = _memory.kind(host, host_size) == cudaMemoryType.cudaMemoryTypeUnregistered
    if stream.captured is not None and len(devices) == 1 and pageable:
        return (INVALID,)

    def copy() -> None:
        for row in range(height):
            ctypes.memmove(dst + row * dpitch, src + row * spitch, width)

    stream.add(copy)
    return (OK,)


def cudaStreamBeginCapture(stream: _Stream, mode: cudaStreamCaptureMode) -> tuple[cudaError_t]:
    if stream.captured is not None or stream.tasks:
        return (INVALID,)
    stream.captured = []
    return (OK,)


def cudaStreamEndCapture(stream: _Stream) -> tuple[Any, ...]:
    tasks, stream.captured = stream.captured, None
    return OK, tasks


def cudaGraphInstantiate(graph: Sequence[Task], flags: int) -> tuple[Any, ...]:
    return OK, list(graph)


def cudaGraphDestroy(graph: Sequence[Task]) -> tuple[cudaError_t]:
    return (OK,)


def cudaGraphExecDestroy(graphExec: Sequence[Task]) -> tuple[cudaError_t]:
    return (OK,)


def cudaGraphLaunch(graphExec: Sequence[Task], stream: _Stream) -> tuple[cudaError_t]:
    for task in graphExec:
        stream.add(task)
    return (OK,)
