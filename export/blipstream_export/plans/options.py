"""How plans are built, as far as a user decides it; no TensorRT is needed to say it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from blipstream.manifest import HardwareLevel


@dataclass(frozen=True)
class PlanOptions:
    """How plans are built.

    Attributes:
        version_compatible: whether later versions of TensorRT may load them; they carry their runtime then.
        hardware: which GPUs may load them: ``none`` but the builder's own kind, those of the ``same`` compute
            capability, or all from Ampere on (``ampere+``).
        plugins: whether the Q-Former's cross-attention is Blipstream's own kernel.
        timing_cache: file in which timings are kept; by default one in the user's cache folder.
    """

    version_compatible: bool = False
    hardware: HardwareLevel = "none"
    plugins: bool = True
    timing_cache: Path | None = None
