"""What a build will need, known from the headers of the weights alone: how much disk and how much memory.

Estimates, meant to be a little above the truth; docs/precision.md compares them with builds that were measured.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from blipstream.contract import QFORMER, VISION_ENCODER
from blipstream.errors import BundleError
from blipstream.manifest import Precision
from blipstream_export.deferred import stored_types
from blipstream_export.precision import StagePrecisions
from blipstream_export.units import GIB, format_bytes

STAGE_PREFIXES = {"vision_model.": VISION_ENCODER, "language_model.": "decoder"}
"""Where the parameters of a stage begin in the models of transformers; the rest are the Q-Former's."""

_FP32_BYTES = 4
_INT4_BYTES = 0.5 + 2 / 32
"""Of one weight: its code, and its share of a scale in fp16."""

_OVERHEAD = 1.02
_FIXED_DISK = 8 << 20
"""Graphs, tokenizer and configurations."""

_FIXED_MEMORY = 5 * GIB // 4
"""Python with torch, transformers and ONNX Runtime."""

_COPIES_WRITTEN = 4
"""Tensors as large as the largest weight that are held while it is rounded and written, at most."""

_LOADED = {"int8": 2.2, "int4": 2.2}
"""Memory of a graph that ONNX Runtime loads, over its file: packed weights, and the file that they were read from."""

_LOADED_FP32 = 2.2
"""The same over the weights in fp32, to which ONNX Runtime casts those that are stored smaller."""


@dataclass(frozen=True)
class Needs:
    """What a build takes at most, in bytes."""

    disk: int
    memory: int
    weights: int
    """All weights in fp32."""
    streamed: bool
    """Whether the checkpoint, too large to be held in memory, is run weight by weight for the parity report."""


def estimate_needs(model: nn.Module, precisions: StagePrecisions, memory: int | None = None) -> Needs:
    """What it takes to build a bundle.

    Args:
        model: the model of transformers with deferred weights.
        precisions: of its stages.
        memory: bytes of this machine; by default what it has.
    """
    memory = total_memory() if memory is None else memory
    multiplied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    stored, weights = (
        dict.fromkeys((*STAGE_PREFIXES.values(), QFORMER), 0.0),
        dict.fromkeys((*STAGE_PREFIXES.values(), QFORMER), 0),
    )
    largest = 0
    for name, parameter in model.named_parameters():
        stage = next((stage for prefix, stage in STAGE_PREFIXES.items() if name.startswith(prefix)), QFORMER)
        head = id(parameter) in embeddings or name.endswith("lm_head.weight")
        size = _stored_bytes(parameter, precisions.of(stage), id(parameter) in multiplied, head)
        stored[stage] += size * parameter.numel()
        weights[stage] += _FP32_BYTES * parameter.numel()
        largest = max(largest, _FP32_BYTES * parameter.numel())
    total = sum(weights.values())
    streamed = total > memory // 2
    loaded = max(
        _loaded_bytes(stored["decoder"], weights["decoder"], precisions.decoder),
        sum(_loaded_bytes(stored[stage], weights[stage], precisions.of(stage)) for stage in (VISION_ENCODER, QFORMER)),
    )
    peak = max(0 if streamed else total, _COPIES_WRITTEN * largest, loaded)
    return Needs(
        disk=int(sum(stored.values()) * _OVERHEAD) + _FIXED_DISK,
        memory=int(peak) + _FIXED_MEMORY,
        weights=total,
        streamed=streamed,
    )


def check_disk(needs: Needs, folder: Path) -> None:
    """Refuse a build for which the disk of ``folder`` has no room.

    Raises:
        BundleError: the message says how much is needed and how much is there.
    """
    free = shutil.disk_usage(folder).free
    if free < needs.disk:
        raise BundleError(
            f"the bundle needs about {format_bytes(needs.disk)} of disk, and {folder} has {format_bytes(free)} left"
        )


def total_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's limit if that is less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
    except OSError:
        return machine
    return min(machine, int(limit)) if limit.isdigit() else machine


def _stored_bytes(parameter: Tensor, precision: Precision, multiplied: bool, head: bool) -> float:
    """Bytes of one value of a parameter in the bundle."""
    types = stored_types(parameter)
    own = types.pop().itemsize if len(types) == 1 else _FP32_BYTES
    if precision == "fp32":
        return min(own, _FP32_BYTES)
    if parameter.dim() < 2:
        return _FP32_BYTES
    if precision in ("fp16", "bf16") or not multiplied:
        return 2
    return _INT4_BYTES if precision == "int4" and not head else 1


def _loaded_bytes(stored: float, weights: int, precision: Precision) -> float:
    return _LOADED[precision] * stored if precision in _LOADED else _LOADED_FP32 * weights
