"""In which precision the stages of a bundle are built, and what each precision must reach.

``fp32`` is exact. ``fp16`` and ``bf16`` are precisions of storage: weights are rounded to them, and computed with in
fp32. ``int8`` multiplies 8-bit weights with activations that are quantized as they come, row by row. ``int4`` is int8
with the language model's matrices at 4 bits, block by block. docs/precision.md has the measurements behind each.

That is so on the CPU. An engine for a GPU computes in fp16 or bf16 what is built in them; TensorRT's int8 and fp8
multiply 8-bit weights with activations whose scales were learnt from samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import get_args

from blipstream.errors import UnsupportedCheckpointError
from blipstream.manifest import EngineName, Precision

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

OF_ENGINE: Mapping[EngineName, tuple[Precision, ...]] = {
    "onnxruntime": ("fp32", "fp16", "bf16", "int8", "int4"),
    "onnxruntime-cuda": ("fp32", "fp16", "bf16"),
    "tensorrt": ("fp32", "fp16", "bf16", "int8", "fp8"),
}
"""What each engine is built in."""


@dataclass(frozen=True)
class StagePrecisions:
    """The precision of each stage; a field is a stage's name in the manifest."""

    vision_encoder: Precision = "fp32"
    qformer: Precision = "fp32"
    decoder: Precision = "fp32"

    def as_dict(self) -> dict[str, Precision]:
        """Precision of each stage, by its name."""
        return {stage: getattr(self, stage) for stage in _STAGES}

    def of(self, stage: str) -> Precision:
        """Precision of the stage called ``stage``."""
        precision: Precision = getattr(self, stage)
        return precision


_STAGES = tuple(field.name for field in fields(StagePrecisions))


def parse_precision(text: str, engine: EngineName = "onnxruntime") -> StagePrecisions:
    """Read ``--precision``: ``int8`` for all stages, ``decoder=int8`` for one, ``int8,decoder=int4`` for both.

    Raises:
        UnsupportedCheckpointError: an unknown precision or stage, a stage named twice, a precision that the engine is
            not built in, or int4 for another stage than the decoder.
    """
    rest: Precision | None = None
    named: dict[str, Precision] = {}
    for part in text.split(","):
        stage, equals, name = (piece.strip() for piece in part.rpartition("="))
        precision = _precision(name, text, engine)
        if not equals and rest is None:
            rest = precision
        elif not equals:
            raise UnsupportedCheckpointError(
                f"precision {text!r} names two precisions for all stages, {rest} and {precision}: expected one"
            )
        elif stage not in _STAGES:
            raise UnsupportedCheckpointError(
                f"precision {text!r} names the stage {stage!r}: expected one of {', '.join(_STAGES)}"
            )
        elif stage in named:
            raise UnsupportedCheckpointError(f"precision {text!r} names the stage {stage} twice: expected it once")
        else:
            named[stage] = precision
    return _check(StagePrecisions(**dict.fromkeys(_STAGES, rest or "fp32") | named), text)


def _precision(name: str, text: str, engine: EngineName) -> Precision:
    for precision in OF_ENGINE[engine]:
        if name == precision:
            return precision
    within = "" if name == text else f" in {text!r}"
    raise UnsupportedCheckpointError(
        f"precision {name!r}{within} is not built for {engine}: expected one of {', '.join(OF_ENGINE[engine])}"
    )


def _check(precisions: StagePrecisions, text: str) -> StagePrecisions:
    for stage in _STAGES:
        if stage != "decoder" and precisions.of(stage) == "int4":
            raise UnsupportedCheckpointError(
                f"precision {text!r} asks for int4 in {stage}, and int4 is built for the decoder alone: expected, for "
                "example, int8,decoder=int4"
            )
    return precisions
