"""Composing a checkpoint of LAVIS's parts: checked as a whole before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from blipstream.errors import CheckpointError, UnsupportedCheckpointError
from blipstream_export.checkpoint import Checkpoint, assemble
from blipstream_export.deferred import defer_all
from blipstream_export.families import Family, find_family
from blipstream_export.faults import faults_of
from blipstream_export.lavis.files import read_tensors
from blipstream_export.lavis.language import LanguagePart, read_language_model
from blipstream_export.lavis.parts import Part, PartFile
from blipstream_export.lavis.qformer import PROJECTIONS, Trained, read_trained
from blipstream_export.lavis.vision import LN_VISION_EPS, Vit, VitKind, find_kind, read_vit
from blipstream_export.processors import check_files

VISION_PREFIX = "visual_encoder."
"""What stands before the ViT's names where the trained part holds it, because it was trained as well."""

_DEFAULTS = "requests that say nothing are decoded greedily, as transformers does it, where LAVIS searches with 5 beams"

_BEGIN = "[DEC]"

_LANGUAGE_MODELS = ("opt_model.", "t5_model.", "llm_model.")


@dataclass(frozen=True)
class LavisParts:
    """Where the parts of a checkpoint are, and what their tensors do not tell."""

    trained: Path
    """``.pth`` of what was trained: Q-Former, query tokens, ``ln_vision``, projection."""
    llm: Path
    """Folder of the language model, in the Hugging Face layout, with its tokenizer."""
    vision: Path | None = None
    """``.pth`` of the ViT; None if the trained part holds it. What both hold is taken from the trained part."""
    vision_layers: int | None = None
    """Blocks of the ViT to keep; by default as many as the trained part holds, or LAVIS's number for this ViT."""
    image_size: int | None = None
    """Height and width of images in pixels; by default what the ViT's position embeddings are for."""
    qformer_tokenizer: Path | None = None
    """Folder of BERT's tokenizer, for a Q-Former that reads the prompt as well (InstructBLIP)."""

    def open(self) -> Checkpoint:
        """Compose the checkpoint; it is named after the trained part.

        Raises:
            UnsupportedCheckpointError: a part is of a kind that is not served.
            CheckpointError: a part is missing, damaged or does not fit the others.
        """
        composition = compose(self)
        tokenizers = [composition.language.tokenizer]
        if composition.trained.instructed:
            tokenizers.append(_read_qformer_tokenizer(self))
        elif self.qformer_tokenizer is not None:
            raise CheckpointError(
                f"a tokenizer for the Q-Former was given, and that of {self.trained} reads no instructions"
            )
        family, config = composition.family, composition.config
        processor = _processor(family, config, tokenizers)
        return assemble(self.llm, self.trained.stem, family, config, processor, composition, notes=composition.notes)


@dataclass(frozen=True)
class Composition:
    """Parts that fit together, and how they are loaded; hardly any weights have been read."""

    family: Family
    config: Any
    """A configuration in transformers. What the ViT has beyond transformers' own is in ``vit``."""
    vit: Vit
    trained: Trained
    language: LanguagePart
    notes: tuple[str, ...]
    """One sentence each on what was used, left over and set."""

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name in transformers, as its file has it: mapped from disk, of any floating-point type.

        Raises:
            CheckpointError: the language model's weights are missing or damaged.
        """
        vision = {f"vision_model.{name}": tensor for name, tensor in self.vit.tensors.items()}
        return {**vision, **self.trained.tensors, **self.language.tensors()}

    def load(self, architecture: Any, *, deferred: bool = False, **options: Any) -> Any:
        """Load all weights into ``architecture`` of transformers, whose ViT becomes LAVIS's.

        Raises:
            CheckpointError: the language model's weights are missing or damaged.
        """
        kind = self.vit.kind

        class Composed(architecture):  # type: ignore[misc]
            def __init__(self, config: Any) -> None:
                super().__init__(config)
                adapt_vision(self.vision_model, kind)

        tensors = self.tensors()
        state: Mapping[str, Tensor] = defer_all(tensors) if deferred else tensors
        return Composed.from_pretrained(None, state_dict=state, **options)


def compose(parts: LavisParts) -> Composition:
    """Read all parts and check that they fit together.

    Raises:
        UnsupportedCheckpointError: a part is of a kind that is not composed.
        CheckpointError: a part is missing, damaged or does not fit the others.
    """
    file = PartFile(parts.trained, read_tensors(parts.trained))
    trained = read_trained(Part("the trained part", (file, "")))
    _check_frozen(file)
    vision, others = _vision(file, parts.vision)
    carried = Part("the ViT", (file, VISION_PREFIX)).count(find_kind(vision).blocks)
    vit = read_vit(vision, image_size=parts.image_size, layers=parts.vision_layers, carried=carried)
    language = read_language_model(parts.llm)
    _check_fit(trained, vit, language, parts.trained, vision.origin)
    notes = (*vit.notes, *(other.account for other in (file, *others)), *language.notes, _DEFAULTS)
    model_type = "instructblip" if trained.instructed else "blip-2"
    family = find_family({"model_type": model_type, "text_config": language.config.to_dict()}, str(parts.trained))
    return Composition(family, _config(family, trained, vit, language), vit, trained, language, notes)


def adapt_vision(model: Any, kind: VitKind) -> None:
    """Make a ``Blip2VisionModel`` the ViT of LAVIS: the epsilon of ``ln_vision`` and, for CLIP, the way in."""
    model.post_layernorm.eps = LN_VISION_EPS
    if kind.pre_norm is None:
        return
    embeddings = model.embeddings
    width, size = embeddings.embed_dim, embeddings.patch_size
    embeddings.patch_embedding = nn.Conv2d(3, width, size, stride=size, bias=False)
    embeddings.pre_norm = nn.LayerNorm(width, eps=kind.eps)
    embeddings.register_forward_hook(lambda module, _inputs, output: module.pre_norm(output))


def _vision(trained: PartFile, path: Path | None) -> tuple[Part, tuple[PartFile, ...]]:
    """The ViT, and the file that it has of its own, if any."""
    held = any(name.startswith(VISION_PREFIX) for name in trained.tensors)
    places = [(trained, VISION_PREFIX)] if held else []
    if path is None:
        if not held:
            raise CheckpointError(f"the trained part {trained.path} holds no ViT: give the .pth of it with --vision")
        return Part("the ViT", *places), ()
    file = PartFile(path, read_tensors(path))
    prefix = next(
        (prefix for prefix in (VISION_PREFIX, "visual.") if any(n.startswith(prefix) for n in file.tensors)), ""
    )
    return Part("the ViT", *places, (file, prefix)), (file,)


def _check_frozen(file: PartFile) -> None:
    """LAVIS keeps the language model as it was; a file that holds one has it for a reason that is not known here."""
    for prefix in _LANGUAGE_MODELS:
        names = [name for name in file.tensors if name.startswith(prefix)]
        if names:
            raise UnsupportedCheckpointError(
                f"the trained part {file.path} holds tensors of a language model ({names[0]} and {len(names) - 1} "
                "more), and Blipstream takes the language model from its own folder alone, as LAVIS trained it frozen"
            )


def _check_fit(trained: Trained, vit: Vit, language: LanguagePart, path: Path, vision: str) -> None:
    width, model_type = vit.config["hidden_size"], language.config.model_type
    if trained.vision_width != width:
        raise CheckpointError(
            f"the Q-Former of {path} reads image features of width {trained.vision_width}, and {vision} gives {width}"
        )
    if model_type not in PROJECTIONS[trained.projection]:
        raise CheckpointError(
            f"the trained part {path} holds {trained.projection}, which is made for a language model of type "
            f"{' or '.join(PROJECTIONS[trained.projection])}, and {language.folder} is one of type {model_type}"
        )
    if trained.text_width != language.config.hidden_size:
        raise CheckpointError(
            f"{trained.projection} of {path} projects to width {trained.text_width}, and the language model "
            f"{language.folder} is {language.config.hidden_size} wide"
        )


def _read_qformer_tokenizer(parts: LavisParts) -> Any:
    """BERT's tokenizer with the token that LAVIS adds (``init_tokenizer`` in ``blip2.py``)."""
    folder = parts.qformer_tokenizer
    if folder is None:
        raise CheckpointError(
            f"the Q-Former of {parts.trained} reads instructions, and its tokenizer, BERT's, lies in no .pth file: "
            "give the folder of it with --qformer-tokenizer"
        )
    check_files(folder, "tokenizer")
    from transformers import BertTokenizer

    with faults_of(f"the tokenizer of {folder}"):
        tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer.add_special_tokens({"bos_token": _BEGIN})
    return tokenizer


def _processor(family: Family, config: Any, tokenizers: Sequence[Any]) -> Any:
    """Images as LAVIS's ``blip_image_eval`` prepares them: a bicubic square, by CLIP's mean and deviation."""
    import transformers
    from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    side = config.vision_config.image_size
    images = transformers.BlipImageProcessorPil(
        size={"height": side, "width": side}, resample=3, image_mean=OPENAI_CLIP_MEAN, image_std=OPENAI_CLIP_STD
    )
    processor = getattr(transformers, family.image_side.processor)
    return processor(images, *tokenizers, num_query_tokens=config.num_query_tokens)


def _config(family: Family, trained: Trained, vit: Vit, language: LanguagePart) -> Any:
    import transformers

    return getattr(transformers, family.image_side.config)(
        vision_config=vit.config,
        qformer_config=trained.config,
        text_config=language.config,
        num_query_tokens=trained.num_query_tokens,
    )
