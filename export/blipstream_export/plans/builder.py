"""From a graph to a plan, by TensorRT's builder, on the GPU that will run it.

Networks are strongly typed (TensorRT 11 knows no others): precision is what the graph says. The timings of kernels are
kept from build to build, for each version of TensorRT and each GPU.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import tensorrt as trt

from blipstream.engines import cuda
from blipstream.engines.tensorrt import Logger
from blipstream.errors import EngineError
from blipstream.extras import needing
from blipstream.manifest import HardwareLevel, PlanSection
from blipstream_export.lowering.plugins import Gpu, has_plugins
from blipstream_export.plans.options import PlanOptions
from blipstream_export.plans.profiles import Profile, shapes

_HARDWARE_LEVELS: Mapping[HardwareLevel, trt.HardwareCompatibilityLevel] = {
    "none": trt.HardwareCompatibilityLevel.NONE,
    "same": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
    "ampere+": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
}


@dataclass(frozen=True)
class Plan:
    """A plan that was built.

    Attributes:
        seconds: that it took.
        bytes: its size.
    """

    seconds: float
    bytes: int


class PlanBuilder:
    """Builds plans one after the other; the owner of TensorRT's builder and of the timing cache.

    Attributes:
        gpu: for which kernels of plugins are compiled.

    Raises:
        EngineError: there is no GPU.
    """

    def __init__(self, options: PlanOptions) -> None:
        cuda.check_device()
        self._options = options
        self._logger = Logger()
        self._builder = trt.Builder(self._logger)
        self.gpu = Gpu(_architecture(options.hardware), cuda.multiprocessors())
        self._cache_file = options.timing_cache or _default_cache()

    def section(self, seconds: Mapping[str, float], *, plugins: bool) -> PlanSection:
        """What a manifest says of the plans.

        Args:
            seconds: build time of each, by its path in the bundle.
            plugins: whether they hold Blipstream's own kernels.
        """
        return PlanSection(
            tensorrt=trt.__version__,
            gpu=cuda.device_name(),
            compute_capability=cuda.compute_capability(),
            version_compatible=self._options.version_compatible,
            hardware=self._options.hardware,
            plugins=plugins,
            seconds=dict(seconds),
        )

    def build(
        self,
        graph: Path,
        plan: Path,
        profiles: Sequence[Profile],
        on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> Plan:
        """Build a plan.

        Args:
            graph: an ONNX graph for TensorRT.
            plan: the file to write.
            profiles: ranges of the graph's free dimensions.
            on_progress: is called with how many steps are done, and how many there are as far as is known.

        Raises:
            EngineError: TensorRT does not read the graph, or builds no engine; the message is TensorRT's.
        """
        started = time.perf_counter()
        model = ir.load(graph)
        if plugins := has_plugins(model):
            _register_plugins()
        network = self._builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS))
        parser = trt.OnnxParser(network, self._logger)
        if not parser.parse_from_file(str(graph)):
            faults = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
            raise EngineError(f"TensorRT {trt.__version__} does not read {graph.name}: {faults}{_hint(plugins)}")
        config = self._config(on_progress)
        for profile in profiles:
            config.add_optimization_profile(self._profile(model, profile))
        serialized = self._builder.build_serialized_network(network, config)
        if serialized is None:
            error = self._logger.take_error()
            raise EngineError(f"TensorRT {trt.__version__} builds no engine of {graph.name}: {error}{_hint(plugins)}")
        self._keep_timings(config)
        plan.parent.mkdir(parents=True, exist_ok=True)
        size = plan.write_bytes(memoryview(serialized))
        return Plan(time.perf_counter() - started, size)

    def _config(self, on_progress: Callable[[int, int], None]) -> Any:
        config = self._builder.create_builder_config()
        config.hardware_compatibility_level = _HARDWARE_LEVELS[self._options.hardware]
        config.clear_flag(trt.BuilderFlag.TF32)  # a graph in fp32 is asked for to be exact
        if self._options.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        config.progress_monitor = _Progress(on_progress)
        timings = self._cache_file.read_bytes() if self._cache_file.is_file() else b""
        if not config.set_timing_cache(config.create_timing_cache(timings), False):  # of another TensorRT, or damaged
            config.set_timing_cache(config.create_timing_cache(b""), False)
        return config

    def _profile(self, model: ir.Model, profile: Profile) -> Any:
        made = self._builder.create_optimization_profile()
        for value in model.graph.inputs:
            dims = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape or ()]
            if any(isinstance(dim, str) for dim in dims):
                smallest, optimal, largest = shapes(profile, dims)
                made.set_shape(str(value.name), smallest, optimal, largest)
        return made

    def _keep_timings(self, config: Any) -> None:
        """Write the timings beside the old ones and then in their place: another build may read them."""
        cache = config.get_timing_cache()
        if cache is None:
            return
        self._cache_file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._cache_file.with_suffix(f".{os.getpid()}.partial")
        partial.write_bytes(memoryview(cache.serialize()))
        partial.replace(self._cache_file)


class _Progress(trt.IProgressMonitor):  # type: ignore[misc]  # TensorRT has no stubs
    """Adds up the steps of TensorRT's phases, which nest and are announced as they come."""

    def __init__(self, on_progress: Callable[[int, int], None]) -> None:
        trt.IProgressMonitor.__init__(self)
        self._on_progress = on_progress
        self._outermost = ""
        self._steps = 1

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        """Called by TensorRT."""
        if parent_phase is None:
            self._outermost, self._steps = phase_name, max(num_steps, 1)

    def step_complete(self, phase_name: str, step: int) -> bool:
        """Called by TensorRT; whether the build goes on."""
        if phase_name == self._outermost:
            self._on_progress(min(step + 1, self._steps), self._steps)
        return True

    def phase_finish(self, phase_name: str) -> None:
        """Called by TensorRT."""


def _register_plugins() -> None:
    """Let TensorRT know Blipstream's plugins."""
    with needing("kernels", EngineError, "; --no-plugins does without"):
        import blipstream_kernels.plugin  # noqa: F401  (registers them)


def _hint(plugins: bool) -> str:
    return "; it holds Blipstream's own kernels, and --no-plugins builds without them" if plugins else ""


def _architecture(hardware: HardwareLevel) -> int:
    """Of the GPU here, or the oldest on which the plans are to run: newer GPUs translate its code."""
    if hardware == "ampere+":
        return 80
    major, minor = cuda.compute_capability().split(".")
    return int(major) * 10 + int(minor)


def _default_cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blipstream"
    gpu = "".join(letter if letter.isalnum() else "-" for letter in cuda.device_name())
    return folder / f"tensorrt-{trt.__version__}-{gpu}.timing"
