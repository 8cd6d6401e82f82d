"""Where a TensorRT engine runs: it was built for one version of TensorRT and one kind of GPU."""

from __future__ import annotations

from blipstream.errors import EngineError
from blipstream.manifest import PlanSection

_AMPERE = (8, 0)


def check_platform(built: PlanSection, tensorrt: str, gpu: str, compute_capability: str) -> None:
    """See that engines can run here, before any is loaded.

    Args:
        built: with what, on what and how they were built.
        tensorrt: version of TensorRT here.
        gpu: name of the GPU here.
        compute_capability: its own.

    Raises:
        EngineError: they cannot; one sentence says what they were built with and what is here.
    """
    check_version(built, tensorrt)
    if not _runs_on(built, gpu, compute_capability):
        raise EngineError(
            f"the engines were built for {_kinds(built)}, but this is {gpu} (compute capability {compute_capability}): "
            "build the bundle here"
        )


def check_version(built: PlanSection, tensorrt: str) -> None:
    """See that a version of TensorRT loads engines.

    Raises:
        EngineError: it does not.
    """
    had, have = _version(built.tensorrt), _version(tensorrt)
    if had == have or (built.version_compatible and had[0] == have[0] and had < have):
        return
    asked = "that version or a later one" if built.version_compatible else "that very version"
    raise EngineError(
        f"the engines were built with TensorRT {built.tensorrt} and need {asked}, but this is TensorRT {tensorrt}: "
        "build the bundle here"
    )


def _runs_on(built: PlanSection, gpu: str, compute_capability: str) -> bool:
    if built.hardware == "ampere+":
        return _version(compute_capability) >= _AMPERE
    if built.hardware == "same":
        return compute_capability == built.compute_capability
    return (gpu, compute_capability) == (built.gpu, built.compute_capability)


def _kinds(built: PlanSection) -> str:
    if built.hardware == "ampere+":
        return "GPUs from Ampere (compute capability 8.0) on"
    if built.hardware == "same":
        return f"GPUs of compute capability {built.compute_capability}"
    return f"{built.gpu} (compute capability {built.compute_capability})"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())
