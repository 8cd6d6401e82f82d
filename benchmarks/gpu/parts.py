"""The parts of the report, most useful per minute first: what each needs, runs, and may take."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.environment import Environment
from benchmarks.gpu.job import Job
from benchmarks.gpu.runner import Outcome
from blipstream.extras import install

REPOSITORY = Path(__file__).resolve().parents[2]
FULL_SIZE = "opt-2.7b"
CUDA_ENGINES = ("tensorrt", "onnxruntime-cuda")
CPU_ENGINE = "onnxruntime"

LIMITS, CHECKPOINT, EAGER, COMPILED = "limits", "checkpoint", "transformers-eager", "transformers-compiled"
KERNEL_TESTS, KERNELS, TESTS = "kernel-tests", "kernels", "tests"
NO_GPU = "no NVIDIA GPU was found"
PARTS_FOLDER, KERNELS_FILE = "parts", "kernels.csv"

_NEEDED_MEMORY = 12 << 30
"""Bytes of a GPU that holds the full-size model in half precision, its cache, and what it computes with."""
_NEEDED_DISK = 25 << 30
"""Bytes for the full-size checkpoint, two bundles of it and what is written on the way."""
_GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """How the report is made.

    Attributes:
        report: its folder.
        work: folder for what is large and can be made again: checkpoint and bundles.
        device: ``cuda``; ``cpu`` rehearses the parts that do not need a GPU.
        dtype: what the models compute in.
        checkpoint: measure this one; None makes the full-size one.
        seconds: how long each quantity is measured.
        backend: of ``torch.compile``.
    """

    report: Path
    work: Path
    device: str = "cuda"
    dtype: str = "fp16"
    checkpoint: Path | None = None
    seconds: float = 3.0
    backend: str = "inductor"

    @property
    def engines(self) -> tuple[str, ...]:
        """Engines that are measured; the targets are those of the first."""
        return CUDA_ENGINES if self.device == "cuda" else (CPU_ENGINE,)

    @property
    def model(self) -> Path:
        """Folder of the checkpoint that is measured."""
        return self.checkpoint or self.work / FULL_SIZE

    def folder(self, part: str) -> Path:
        """Where a part leaves what it finds."""
        return self.report / PARTS_FOLDER / part


Need = Callable[[Environment, Plan], "str | None"]
"""Why a part cannot run here; None when it can."""


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: on the command line and in the report.
        title: what it finds out.
        command: without the interpreter.
        limit: seconds that it may take.
        needs: all of them must be there.
        after: parts that must be done before.
        passing: exit statuses of a part that is done.
    """

    name: str
    title: str
    command: tuple[str, ...]
    limit: float
    needs: tuple[Need, ...] = ()
    after: tuple[str, ...] = ()
    passing: frozenset[int] = field(default=frozenset({0}))

    @property
    def full_command(self) -> list[str]:
        """With the interpreter."""
        return [sys.executable, *self.command]


def has_gpu(environment: Environment, plan: Plan) -> str | None:
    """A GPU, or a rehearsal that does without."""
    return NO_GPU if plan.device == "cuda" and environment.gpu is None else None


def is_no_rehearsal(environment: Environment, plan: Plan) -> str | None:
    """A GPU in any case."""
    del environment
    return "it needs a GPU, and this is a rehearsal on the CPU" if plan.device != "cuda" else None


def has_torch(environment: Environment, plan: Plan) -> str | None:
    """A torch that computes on the device."""
    version = environment.versions.get("torch")
    if version is None:
        return "torch is not installed"
    if plan.device == "cpu" or environment.torch_sees_gpu:
        return None
    if environment.torch_cuda is None:
        return f"torch {version} is built without CUDA: `pip install --force-reinstall torch` brings one with it"
    return (
        f"torch {version}, built for CUDA {environment.torch_cuda}, does not see the GPU: is the driver too old for it?"
    )


def has_memory(environment: Environment, plan: Plan) -> str | None:
    """Room for the full-size model."""
    if plan.checkpoint is not None or environment.gpu_memory is None or environment.gpu_memory >= _NEEDED_MEMORY:
        return None
    return (
        f"the GPU has {environment.gpu_memory / _GIB:.1f} GiB of memory, and {FULL_SIZE} needs {_NEEDED_MEMORY // _GIB}"
    )


def has_disk(environment: Environment, plan: Plan) -> str | None:
    """Room for what is made of the full-size model."""
    del environment
    there = next(folder for folder in (plan.work, *plan.work.parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if free >= _NEEDED_DISK:
        return None
    return f"{there} has {free / _GIB:.1f} GiB of disk left, and {FULL_SIZE} needs {_NEEDED_DISK // _GIB}: see --work"


def has_tensorrt(environment: Environment, plan: Plan) -> str | None:
    """TensorRT with its library."""
    del plan
    if environment.tensorrt is not None:
        return None
    return f"TensorRT cannot be imported: {install('tensorrt')} brings it"


def has_cuda_provider(environment: Environment, plan: Plan) -> str | None:
    """ONNX Runtime with CUDA."""
    del plan
    if "CUDAExecutionProvider" in environment.providers:
        return None
    return f"ONNX Runtime has no CUDAExecutionProvider: {install('cuda')} brings it"


_ENGINE_NEEDS: Mapping[str, tuple[Need, ...]] = {
    "tensorrt": (has_gpu, has_tensorrt, has_torch, has_memory),
    "onnxruntime-cuda": (has_gpu, has_cuda_provider, has_torch, has_memory),
    CPU_ENGINE: (has_torch,),
}
_ENGINE_LIMITS = {"tensorrt": (3600, 900), "onnxruntime-cuda": (2400, 900), CPU_ENGINE: (600, 600)}
"""Seconds of a build, and of measuring."""


def make_parts(plan: Plan) -> tuple[Part, ...]:
    """All parts of a plan, in the order in which they run."""
    best, *others = plan.engines
    return (
        Part(
            LIMITS,
            "what the device gives at most: copy bandwidth, matrix products",
            _job(plan, LIMITS, "limits"),
            180,
            (has_gpu, has_torch),
        ),
        Part(
            KERNEL_TESTS,
            "tests of the kernels",
            _pytest(plan, KERNEL_TESTS, "tests/kernels"),
            900,
            (has_gpu, is_no_rehearsal, has_torch),
        ),
        Part(
            KERNELS,
            "speed of the kernels",
            ("-m", "benchmarks.kernels", "--rows", str(plan.folder(KERNELS) / KERNELS_FILE)),
            900,
            (has_gpu, is_no_rehearsal, has_torch),
        ),
        *_checkpoint(plan),
        Part(
            EAGER,
            "captions by transformers, as it comes",
            _job(plan, EAGER, "huggingface", "eager", plan.backend),
            900,
            (has_gpu, has_torch, has_memory),
            _models_first(plan),
        ),
        *_engine_parts(plan, best),
        Part(
            COMPILED,
            "captions by transformers, static cache, compiled",
            _job(plan, COMPILED, "huggingface", "compiled", plan.backend),
            1800,
            (has_gpu, has_torch, has_memory),
            _models_first(plan),
        ),
        Part(
            TESTS,
            "all other tests that need a GPU",
            _pytest(plan, TESTS, "tests", "--ignore=tests/kernels"),
            1800,
            (has_gpu, is_no_rehearsal, has_torch),
        ),
        *(part for engine in others for part in _engine_parts(plan, engine)),
    )


def reason_to_skip(part: Part, environment: Environment, plan: Plan, outcomes: Mapping[str, Outcome]) -> str | None:
    """Why a part is not run; None when it can be."""
    for need in part.needs:
        if (reason := need(environment, plan)) is not None:
            return reason
    for name in part.after:
        outcome = outcomes.get(name)
        if outcome is None or outcome.status != "done":
            return f"it comes after {name}, which is {outcome.status if outcome else 'not run yet'}"
    return None


def _models_first(plan: Plan) -> tuple[str, ...]:
    return () if plan.checkpoint else (CHECKPOINT,)


def _checkpoint(plan: Plan) -> tuple[Part, ...]:
    """The part that makes the full-size checkpoint, where none was given."""
    if plan.checkpoint is not None:
        return ()
    command = ("-m", "benchmarks.fullsize", "checkpoint", FULL_SIZE, str(plan.model))
    return (
        Part(CHECKPOINT, "makes the full-size model, 7 GB", command, 1200, (has_gpu, has_torch, has_memory, has_disk)),
    )


def _engine_parts(plan: Plan, engine: str) -> tuple[Part, Part]:
    """Building a bundle, and measuring it."""
    building, measuring = _ENGINE_LIMITS[engine]
    build, needs = f"{engine}-build", _ENGINE_NEEDS[engine]
    return (
        Part(
            build,
            f"builds a bundle for {engine}",
            _job(plan, build, "bundles", "build", engine),
            building,
            needs,
            _models_first(plan),
        ),
        Part(
            engine,
            f"Blipstream with {engine}: stages and captions",
            _job(plan, engine, "bundles", "measure", engine),
            measuring,
            needs,
            (build,),
        ),
    )


def _job(plan: Plan, part: str, module: str, *extra: str) -> tuple[str, ...]:
    job = Job(plan.folder(part), plan.device, plan.dtype, plan.model, plan.work, plan.seconds)
    return ("-m", f"benchmarks.gpu.{module}", *extra, *job.arguments())


def _pytest(plan: Plan, part: str, *paths: str) -> tuple[str, ...]:
    junit = plan.folder(part) / "junit.xml"
    return ("-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={junit}", *paths)
