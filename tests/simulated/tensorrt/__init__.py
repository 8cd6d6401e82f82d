"""TensorRT on a machine without a GPU: what Blipstream uses of its API, on ONNX Runtime.

A plan holds the standard form of the graph (:mod:`blipstream_export.lowering.tensorrt_reference`) and its optimization
profiles; a run reads and writes the addresses that it was given, in the simulated memory of
:mod:`cuda.bindings.runtime`. Where TensorRT is strict, so is this: shapes must be within the profile in use, addresses
on the device, a cache's output at its input's address, and a context must have memory for its activations. That the
real API has every name and every argument that Blipstream uses is checked elsewhere, against the real bindings.
"""

from __future__ import annotations

import base64
import ctypes
import enum
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from blipstream_export.lowering.tensorrt_operators import check_importable
from blipstream_export.lowering.tensorrt_reference import standard_form
from cuda.bindings import runtime as cuda

from blipstream.errors import EngineError

__version__ = "11.4.0.106"
_SCRATCH = 4096


class DataType(enum.Enum):
    FLOAT = np.float32
    HALF = np.float16
    BF16 = "bf16"
    INT64 = np.int64
    INT32 = np.int32
    INT8 = np.int8
    UINT8 = np.uint8
    BOOL = np.bool_


_OF_ORT = {
    "tensor(float)": DataType.FLOAT,
    "tensor(float16)": DataType.HALF,
    "tensor(int64)": DataType.INT64,
    "tensor(int32)": DataType.INT32,
    "tensor(bool)": DataType.BOOL,
}

TensorIOMode = enum.Enum("TensorIOMode", "NONE INPUT OUTPUT")
BuilderFlag = enum.Enum("BuilderFlag", "VERSION_COMPATIBLE TF32")
HardwareCompatibilityLevel = enum.Enum("HardwareCompatibilityLevel", "NONE AMPERE_PLUS SAME_COMPUTE_CAPABILITY")
MemoryPoolType = enum.Enum("MemoryPoolType", "WORKSPACE")
ExecutionContextAllocationStrategy = enum.Enum("ExecutionContextAllocationStrategy", "STATIC USER_MANAGED")


class NetworkDefinitionCreationFlag(enum.IntEnum):
    PREFER_AOT_PYTHON_PLUGINS = 2


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    pass


# --- building --------------------------------------------------------------------------------------------------------


class _Tensor:
    def __init__(self, value: ir.Value) -> None:
        self.name = value.name
        self.shape = tuple(size if isinstance(size, int) else -1 for size in value.shape or ())


class _Network:
    def __init__(self) -> None:
        self.model: ir.Model | None = None

    @property
    def num_inputs(self) -> int:
        return len(self.model.graph.inputs)

    def get_input(self, index: int) -> _Tensor:
        return _Tensor(self.model.graph.inputs[index])


class _ParserError:
    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text


class OnnxParser:
    def __init__(self, network: _Network, logger: ILogger) -> None:
        self._network = network
        self._errors: list[_ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> _ParserError:
        return self._errors[index]

    def parse_from_file(self, model: str) -> bool:
        loaded = ir.load(model)
        try:
            check_importable(loaded)
        except EngineError as error:
            self._errors.append(_ParserError(str(error)))
            return False
        from tensorrt.plugin import REGISTERED

        for node in loaded.graph:
            name = f"{node.domain}::{node.op_type}"
            if "plugin_namespace" in node.attributes and name not in REGISTERED:
                self._errors.append(_ParserError(f"there is no plugin {name}"))
                return False
        self._network.model = loaded
        self._network.path = model
        return True


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        if not all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True)):
            raise ValueError(f"{input}: {min} <= {opt} <= {max} does not hold")
        self.shapes[input] = [list(min), list(opt), list(max)]


class _TimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content


class _Config:
    def __init__(self) -> None:
        self.profiles: list[_Profile] = []
        self.flags = {BuilderFlag.TF32}  # as in TensorRT, unless it is cleared
        self.hardware_compatibility_level = HardwareCompatibilityLevel.NONE
        self.progress_monitor: Any = None
        self._cache: _TimingCache | None = None

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        assert pool_size > 0

    def add_optimization_profile(self, profile: _Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> _TimingCache:
        return _TimingCache(bytes(serialized_timing_cache))

    def set_timing_cache(self, cache: _TimingCache, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return not cache.content or cache.content.startswith(b"timed ")

    def get_timing_cache(self) -> _TimingCache | None:
        return self._cache


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> _Network:
        return _Network()

    def create_builder_config(self) -> _Config:
        return _Config()

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes | None:
        if fault := _fault(network, config):
            self._logger.log(ILogger.Severity.ERROR, fault)
            return None
        if monitor := config.progress_monitor:
            monitor.phase_start("Building", None, 2)
            if not all(monitor.step_complete("Building", step) for step in range(2)):
                return None
            monitor.phase_finish("Building")
        if config._cache is not None:
            config._cache.content += b"timed "
        aliases = {
            node.outputs[0].name: node.inputs[0].name for node in network.model.graph if node.op_type == "TensorScatter"
        }
        with TemporaryDirectory() as folder:
            # Loaded again, since the graph is changed; and written whole, since a plan is one file.
            model = ir.load(network.path)
            standard_form(model)
            path = Path(folder, "graph.onnx")
            onnx.save(ir.to_proto(ir.external_data.load_to_model(model)), path)
            graph = base64.b64encode(path.read_bytes()).decode()
        level = config.hardware_compatibility_level.name
        plan = {
            "version": __version__,
            "flags": sorted(flag.name for flag in config.flags),
            "hardware": level,
            "capability": list(cuda.CAPABILITY) if level == "NONE" else None,
            "profiles": [profile.shapes for profile in config.profiles],
            "aliases": aliases,
            "graph": graph,
        }
        return json.dumps(plan).encode()


def _fault(network: _Network, config: _Config) -> str:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    for profile, tensor in itertools.product(config.profiles, inputs):
        if -1 not in tensor.shape:
            continue
        if tensor.name not in profile.shapes:
            return f"no shape was set for the input {tensor.name}"
        for shape in profile.shapes[tensor.name]:
            if len(shape) != len(tensor.shape) or any(
                b not in (-1, a) for a, b in zip(shape, tensor.shape, strict=True)
            ):
                return f"the input {tensor.name} of shape {tensor.shape} cannot have the shape {shape}"
    return "" if config.profiles else "the network has dynamic inputs, and no optimization profile was defined"


# --- running ---------------------------------------------------------------------------------------------------------


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        try:
            plan = json.loads(bytes(serialized_engine))
        except ValueError:
            self._logger.log(ILogger.Severity.ERROR, "the magic tag does not match")
            return None
        if plan["version"] != __version__:
            fault = f"the plan is of version {plan['version']}, and this is {__version__}"
            self._logger.log(ILogger.Severity.ERROR, fault)
            return None
        if plan["capability"] not in (None, list(cuda.CAPABILITY)):
            self._logger.log(ILogger.Severity.ERROR, f"the plan is for compute capability {plan['capability']}")
            return None
        return ICudaEngine(plan, self._logger)


class ICudaEngine:
    device_memory_size_v2 = _SCRATCH

    def __init__(self, plan: dict[str, Any], logger: ILogger) -> None:
        self.logger = logger
        self.profiles = plan["profiles"]
        self.aliases = plan["aliases"]
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        content = base64.b64decode(plan["graph"])
        self.session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.tensors = {node.name: node for node in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.inputs = [node.name for node in self.session.get_inputs()]

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return _OF_ORT[self.tensors[name].type]

    def get_tensor_shape(self, name: str) -> list[int]:
        return [size if isinstance(size, int) else -1 for size in self.tensors[name].shape]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        shapes: list[list[int]] = self.profiles[profile_index].get(name) or [self.get_tensor_shape(name)] * 3
        return shapes

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.aliases.get(name)

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> IExecutionContext:
        return IExecutionContext(self, has_memory=strategy == ExecutionContextAllocationStrategy.STATIC)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, *, has_memory: bool) -> None:
        self._engine = engine
        self._has_memory = has_memory
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._dims: dict[str, int] = {}

    def set_device_memory(self, memory: int, size: int) -> None:
        self._has_memory = cuda.is_device(memory, size) and size >= _SCRATCH

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = profile_index
        return profile_index < self._engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        if len(shape) != len(low) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            return self._fail(f"{name} of shape {shape} is not within profile {self._profile}")
        self._shapes[name] = tuple(shape)
        for size, dim in zip(shape, self._engine.tensors[name].shape, strict=True):
            if isinstance(dim, str) and self._dims.setdefault(dim, size) != size:
                self._dims[dim] = size
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return name in self._engine.tensors

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        dims = self._engine.tensors[name].shape
        return tuple(eval(dim, {}, self._dims) if isinstance(dim, str) else dim for dim in dims)  # as "17*batch"

    def execute_async_v3(self, stream_handle: int) -> bool:
        if not self._has_memory:
            return self._fail("the context has no memory for activations")
        if missing := [name for name in self._engine.tensors if name not in self._addresses]:
            return self._fail(f"there is no address for {missing}")
        for output, name in self._engine.aliases.items():
            if self._addresses[output] != self._addresses[name]:
                return self._fail(f"{output} must lie at the address of {name}")
        # All is read now: a captured graph keeps the shapes and addresses of the capture.
        arrays = {name: self._array(name, self._addresses[name]) for name in self._engine.tensors}
        if any(array is None for array in arrays.values()):
            return self._fail("an address is not the device's")
        cuda.enqueue(stream_handle, lambda: self._run(arrays))
        return True

    def _run(self, arrays: dict[str, Any]) -> None:
        names = [name for name in arrays if name not in self._engine.inputs]
        try:
            inputs = {name: arrays[name].copy() for name in self._engine.inputs}
            results = self._engine.session.run(names, inputs)
        except Exception as error:
            raise cuda.LaunchError(str(error)) from error
        for name, result in zip(names, results, strict=True):
            arrays[name][...] = result

    def _array(self, name: str, address: int) -> Any:
        shape = self._shapes.get(name) or self.get_tensor_shape(name)
        dtype = np.dtype(self._engine.get_tensor_dtype(name).value)
        size = int(np.prod(shape)) * dtype.itemsize
        if not cuda.is_device(address, size):
            return None
        return np.ndarray(shape, dtype, buffer=(ctypes.c_uint8 * size).from_address(address))

    def _fail(self, text: str) -> bool:
        self._engine.logger.log(ILogger.Severity.ERROR, text)
        return False
