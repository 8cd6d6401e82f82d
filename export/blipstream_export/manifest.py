"""What a bundle says of itself, read from its checkpoint."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping

from blipstream.manifest import (
    BUNDLE_REVISION,
    DecoderSection,
    EngineName,
    GenerationSection,
    InstructionSection,
    Manifest,
    PlanSection,
    Precision,
    QFormerSection,
    VisionSection,
)
from blipstream_export.checkpoint import Checkpoint

_VERSIONED = ("blipstream", "torch", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy")


def make_manifest(
    checkpoint: Checkpoint,
    decoder: DecoderSection,
    generation: GenerationSection,
    *,
    engine: EngineName,
    plans: PlanSection | None,
    max_batch: int,
    precision: Mapping[str, Precision],
) -> Manifest:
    """The manifest of a bundle whose files are not listed yet.

    Args:
        checkpoint: what the bundle is built from.
        decoder: sizes of the language model and its cache.
        generation: defaults of the checkpoint's own ``generate``.
        engine: what runs the graphs.
        plans: of TensorRT's engines.
        max_batch: images that are read at once.
        precision: of each stage.
    """
    vision, qformer = checkpoint.config.vision_config, checkpoint.config.qformer_config
    return Manifest(
        revision=BUNDLE_REVISION,
        kind=checkpoint.family.kind,
        source=checkpoint.name,
        commit=checkpoint.commit,
        engine=engine,
        plans=plans,
        max_batch=max_batch,
        precision=dict(precision),
        image=checkpoint.image,
        vision=VisionSection(
            num_image_tokens=num_image_tokens(checkpoint),
            hidden_size=vision.hidden_size,
            num_layers=vision.num_hidden_layers,
            num_frames=checkpoint.family.image_side.num_frames,
        ),
        qformer=QFormerSection(
            num_query_tokens=checkpoint.config.num_query_tokens,
            hidden_size=qformer.hidden_size,
            num_layers=qformer.num_hidden_layers,
            instruction=instruction_section(checkpoint),
        ),
        decoder=decoder,
        generation=generation,
        versions={name: _version(name) for name in _VERSIONED},
        files={},
    )


def instruction_section(checkpoint: Checkpoint) -> InstructionSection | None:
    """What the Q-Former reads of an instruction, if it does."""
    if not checkpoint.instructed:
        return None
    qformer = checkpoint.config.qformer_config
    return InstructionSection(
        vocab_size=qformer.vocab_size,
        max_tokens=qformer.max_position_embeddings,
        pad_token_id=qformer.pad_token_id or 0,
    )


def num_image_tokens(checkpoint: Checkpoint) -> int:
    """Tokens that the ViT makes of an image: one for each patch, and the class token."""
    patch = checkpoint.config.vision_config.patch_size
    side = checkpoint.image.size // (patch if isinstance(patch, int) else patch[0])
    return int(side * side + 1)


def _version(package: str) -> str:
    """Of an installed package; that of ONNX Runtime for GPUs has another name and the same modules."""
    for name in (package, f"{package}-gpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"
