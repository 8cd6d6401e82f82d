"""The interface of an inference engine: one loaded graph, run on NumPy arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from blipstream.engines.cache import CacheShape, HostKVCache, KVCache
from blipstream.engines.memory import Array, DeviceArray, Tensor
from blipstream.errors import EngineError

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a loaded graph."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]
    """One entry a dimension: a size, or the name of a free dimension (None when it has none)."""


class BoundRun(Protocol):
    """A run whose inputs and outputs are fixed memory (:meth:`Engine.bind`)."""

    def run(self) -> None:
        """Read the bound inputs, write the bound outputs.

        Raises:
            EngineError: the graph failed; the outputs are undefined.
        """
        ...


class Engine(ABC):
    """One graph, loaded and ready to run. Its own resources end with :meth:`close` or with the ``with`` block.

    :meth:`run` may be called from several threads at once; a bound run belongs to one thread at a time.
    """

    def __init__(self, name: str, inputs: tuple[TensorInfo, ...], outputs: tuple[TensorInfo, ...]) -> None:
        self.name = name
        self.inputs = inputs
        self.outputs = outputs

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph once; ``inputs`` maps each input's name to an array, the result does so for the outputs.

        Raises:
            EngineError: an input is missing, unknown or of another type or rank, or the graph failed.
        """
        self._check("input", self.inputs, inputs)
        return self._run(inputs)

    def bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> BoundRun:
        """Prepare a run that reads and writes the given C-contiguous arrays in place, each time that it is run.

        An output may share its memory with an input where the graph allows it, as the KV cache of a decoder does. An
        engine of a device reads and writes its device's arrays without copies, and arrays of the host by one copy each.

        Raises:
            EngineError: an array is missing, unknown, not contiguous, or of another type or rank.
        """
        self._check("input", self.inputs, inputs)
        self._check("output", self.outputs, outputs)
        for name, array in (*inputs.items(), *outputs.items()):
            if isinstance(array, np.ndarray) and not array.flags.c_contiguous:
                raise EngineError(f"{self.name}: the array bound to {name} must be C-contiguous, but it is not")
        return self._bind(inputs, outputs)

    def allocate(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Tensor:
        """An array in the memory that this engine computes in; its contents are undefined."""
        return np.empty(shape, dtype)

    def allocate_host(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
        """An array of zeros in the host's memory, where this engine reads and writes it fastest."""
        return np.zeros(shape, dtype)

    def copy_to_host(self, source: Tensor, target: Array) -> None:
        """Copy what a run has written, wherever it lies, into an array of its shape and type."""
        assert not isinstance(source, DeviceArray)  # an engine of a device knows how
        np.copyto(target, source)

    def allocate_cache(self, name: str, shape: CacheShape) -> KVCache:
        """Allocate a KV cache in the memory that this engine computes in.

        Args:
            name: of one of the inputs that read the cache; the cache has its type.
            shape: its sizes.
        """
        return self._make_cache(shape, self._dtype(name))

    def _make_cache(self, shape: CacheShape, dtype: np.dtype[Any]) -> KVCache:
        return HostKVCache(shape, dtype)

    def _dtype(self, name: str) -> np.dtype[Any]:
        """Type of an input; of one that is missing, for which the graph is refused elsewhere, float32."""
        types = {info.name: info.dtype for info in self.inputs}
        return types.get(name, np.dtype(np.float32))

    @abstractmethod
    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]: ...

    @abstractmethod
    def _bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> BoundRun: ...

    @abstractmethod
    def close(self) -> None:
        """Release the graph and its threads; further runs raise :class:`EngineError`. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _check(self, kind: str, declared: tuple[TensorInfo, ...], given: Mapping[str, Tensor]) -> None:
        if len(given) != len(declared) or any(info.name not in given for info in declared):
            expected = ", ".join(info.name for info in declared)
            raise EngineError(
                f"{self.name}: expected the {kind}s {expected}, but was given {', '.join(given) or 'none'}"
            )
        for info in declared:
            array = given[info.name]
            if array.dtype != info.dtype or array.ndim != len(info.shape):
                raise EngineError(
                    f"{self.name}: {kind} {info.name} must be {info.dtype} with {len(info.shape)} dimensions, "
                    f"but it is {array.dtype} with {array.ndim}"
                )
