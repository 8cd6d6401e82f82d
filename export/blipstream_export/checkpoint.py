"""Opening a checkpoint: found, whole, of a kind that is served, and consistent, or refused in one sentence.

:func:`open_checkpoint` reads configuration files and the headers of the weights alone; :func:`load_model` reads the
weights. In between, nothing has been computed and little has been read, so that a fault costs seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from blipstream.errors import CheckpointError, UnsupportedCheckpointError
from blipstream.manifest import DecoderSection, ImageSection
from blipstream_export.families import Family, LanguageModule, find_family
from blipstream_export.faults import faults_of
from blipstream_export.files import read_json
from blipstream_export.generation import empty_prompt_ids, is_token
from blipstream_export.location import CONFIG_FILE, fetch_weights, locate
from blipstream_export.processors import frame, load_processor
from blipstream_export.weights import TensorHeader, read_headers, weight_notes

GENERATION_FILE = "generation_config.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_WEIGHTS = (".weight", ".bias", "query_tokens")
_RESAMPLE: dict[int, Any] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


class Weights(Protocol):
    """Where the weights of a checkpoint are."""

    def load(self, architecture: Any, *, deferred: bool = False, **options: Any) -> Any:
        """Load them by ``architecture.from_pretrained`` of transformers, with its ``options``; return what it does.

        With ``deferred``, parameters are :class:`~blipstream_export.deferred.Deferred` tensors.
        """


class Source(Protocol):
    """Parts that can be opened as a checkpoint, and are not one in the Hugging Face layout."""

    def open(self) -> Checkpoint:
        """Check the parts without loading weights.

        Raises:
            UnsupportedCheckpointError: a kind of checkpoint, or a configuration, that is not served.
            CheckpointError: files are missing, damaged or inconsistent.
        """


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are all there, and what they say; no weights are loaded."""

    folder: Path
    """Where its tokenizer is, and all the rest if it is in the Hugging Face layout."""
    name: str
    """The folder's or the file's name, or the hub id."""
    family: Family
    config: Any
    """The configuration in transformers, with ``num_query_tokens`` and the placeholder's id filled in where an old one
    lacks them."""
    processor: Any
    """The processor in transformers. It puts :attr:`num_soft_tokens` placeholders before a prompt, unless
    :attr:`placeholder_id` is None."""
    image: ImageSection
    weights: Weights
    notes: tuple[str, ...] = ()
    """What a user should know, one sentence each."""
    commit: str | None = None
    """The commit on the hub, where it is known."""

    @property
    def instructed(self) -> bool:
        """Whether its Q-Former reads the prompt as well."""
        return self.family.image_side.instructed

    @property
    def placeholder_id(self) -> int | None:
        """Id of the token that stands for one soft token in a prompt's ids; None where the language model has no row
        for it."""
        token: int | None = getattr(self.config, self.family.image_side.placeholder_field)
        return token

    @property
    def num_soft_tokens(self) -> int:
        """Soft tokens before a prompt, those of all frames together."""
        return int(self.config.num_query_tokens) * self.family.image_side.num_frames

    @property
    def language(self) -> LanguageModule:
        """What is particular to its language model."""
        return self.family.language.load()

    def decoder_section(self, *, max_sequences: int, max_tokens: int) -> DecoderSection:
        """The language model's sizes, with a KV cache of ``max_sequences`` rows of ``max_tokens`` tokens."""
        return self.language.decoder_section(
            self.config.text_config, max_sequences=max_sequences, max_tokens=max_tokens
        )


def open_checkpoint(source: str | Source, *, revision: str | None = None) -> Checkpoint:
    """Open a folder or a hub id in the Hugging Face layout, or the parts of a checkpoint.

    ``revision`` is a branch, a tag or a commit of a hub id, which may be written ``owner/name@revision`` as well.

    Raises:
        UnsupportedCheckpointError: a kind of checkpoint, or a configuration, that is not served.
        CheckpointError: files are missing, truncated or inconsistent.
    """
    if not isinstance(source, str):
        if revision is not None:
            raise CheckpointError(f"a revision ({revision}) belongs to a hub id, and parts of a checkpoint were given")
        return source.open()
    place = locate(source, revision)
    folder = place.folder
    raw = read_json(folder / CONFIG_FILE)
    family = find_family(raw, source)
    _check_quantization(raw, folder)
    fetch_weights(place)
    headers = read_headers(folder)
    _check_types(headers)
    with faults_of(f"the configuration {folder / CONFIG_FILE}"):
        import transformers

        config = getattr(transformers, family.image_side.config).from_pretrained(folder)
    config.num_query_tokens = _num_query_tokens(raw, headers, folder)
    opened = assemble(
        folder,
        place.name,
        family,
        config,
        load_processor(folder, family.image_side),
        _Folder(folder),
        weight_notes(folder),
    )
    return replace(opened, commit=place.commit)


def assemble(
    folder: Path,
    name: str,
    family: Family,
    config: Any,
    processor: Any,
    weights: Weights,
    notes: tuple[str, ...] = (),
) -> Checkpoint:
    """Make a checkpoint of what was read, once it agrees; the arguments are the fields of :class:`Checkpoint`.

    Raises:
        UnsupportedCheckpointError: a configuration that is not served.
        CheckpointError: configuration and processor contradict each other.
    """
    frame(processor, config, family.image_side, folder)
    image = _image_section(processor, config)
    checkpoint = Checkpoint(folder, name, family, config, processor, image, weights, notes)
    _check_text_config(checkpoint, name)
    _check_frames(checkpoint, name)
    return checkpoint


def load_model(checkpoint: Checkpoint, *, deferred: bool = False) -> Any:
    """Load the weights in fp32, for inference, into the model of transformers.

    Args:
        checkpoint: the checkpoint.
        deferred: read no weights now, but each of them whenever it is used (:mod:`blipstream_export.deferred`).

    Raises:
        CheckpointError: a tensor is missing or of another shape than the configuration says.
    """
    import torch
    import transformers

    from blipstream_export.deferred import label_parameters

    architecture = getattr(transformers, checkpoint.family.image_side.architecture)
    with faults_of(f"the weights of {checkpoint.folder}"):
        loaded = checkpoint.weights.load(
            architecture,
            deferred=deferred,
            config=checkpoint.config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # reported below, all of them together
            output_loading_info=True,
        )
    model, info = loaded
    _check_loading(info, checkpoint.folder)
    if deferred:
        label_parameters(model)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class _Folder:
    """Weights in the Hugging Face layout."""

    path: Path

    def load(self, architecture: Any, *, deferred: bool = False, **options: Any) -> Any:
        import transformers

        from blipstream_export.shards import deferred_tensors, mapped_tensors

        tensors = (deferred_tensors if deferred else mapped_tensors)(self.path)
        loaded = architecture.from_pretrained(None, state_dict=tensors, **options)
        if (self.path / GENERATION_FILE).is_file():  # which transformers takes from a folder beside the weights
            loaded[0].generation_config = transformers.GenerationConfig.from_pretrained(self.path)
        return loaded


def _check_quantization(raw: Mapping[str, Any], folder: Path) -> None:
    for section in (raw, raw.get("text_config") or {}):
        if found := section.get("quantization_config"):
            method = found.get("quant_method", "an unknown method") if isinstance(found, dict) else found
            raise UnsupportedCheckpointError(
                f"the checkpoint {folder} is quantized ({method}), and Blipstream builds from weights in floating "
                "point: give the checkpoint that it was made from, and --precision int8 or int4"
            )


def _check_types(headers: Mapping[str, TensorHeader]) -> None:
    """Refuse weights that are not of a floating-point type that every engine reads, float8 included."""
    for name, header in headers.items():
        if name.endswith(_WEIGHTS) and header.dtype not in _FLOATS:
            raise CheckpointError(
                f"the tensor {name} in {header.file} is of type {header.dtype}: expected one of {', '.join(_FLOATS)}"
            )


def _num_query_tokens(raw: Mapping[str, Any], headers: Mapping[str, TensorHeader], folder: Path) -> int:
    header = headers.get("query_tokens")
    if header is None or len(header.shape) != 3:
        prefixed = [name.removesuffix("query_tokens") for name in headers if name.endswith(".query_tokens")]
        more = f": its tensors' names begin with {prefixed[0]!r}, which has to be cut off" if prefixed else ""
        raise CheckpointError(
            f"the checkpoint {folder} lacks the tensor query_tokens (1, number of queries, width){more}"
        )
    declared = raw.get("num_query_tokens")
    if declared is not None and declared != header.shape[1]:
        raise CheckpointError(
            f"the configuration of {folder} declares num_query_tokens = {declared}, but the tensor query_tokens holds "
            f"{header.shape[1]}"
        )
    return int(header.shape[1])


def _check_text_config(checkpoint: Checkpoint, source: str) -> None:
    text = checkpoint.config.text_config
    checkpoint.language.check_config(text, source)
    for name in ("bos_token_id", "pad_token_id"):
        value = getattr(text, name, None)
        if is_token(value) and value >= text.vocab_size:
            raise CheckpointError(
                f"{name} = {value} of {source} is outside the language model's vocabulary of {text.vocab_size} tokens"
            )
    if not checkpoint.instructed and not empty_prompt_ids(checkpoint):
        raise UnsupportedCheckpointError(
            f"the language model of {source} has no bos_token_id and its tokenizer makes nothing of an empty text: a "
            "caption without a prompt has nothing to begin with"
        )


def _check_frames(checkpoint: Checkpoint, source: str) -> None:
    """Refuse what makes the soft tokens of one frame depend on the others."""
    width = checkpoint.decoder_section(max_sequences=1, max_tokens=1).hidden_size
    hidden = checkpoint.config.text_config.hidden_size
    if checkpoint.family.image_side.num_frames > 1 and width != hidden:
        raise UnsupportedCheckpointError(
            f"the language model of {source} has embeddings of width {width} under a hidden state of {hidden}, and "
            "with several frames only equal widths are served"
        )


def _image_section(processor: Any, config: Any) -> ImageSection:
    images = processor.image_processor
    for step in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if not getattr(images, step, False):
            raise UnsupportedCheckpointError(f"the image processor has {step} = false, and only true is served")
    for step in ("do_center_crop", "do_pad"):
        if getattr(images, step, False):
            raise UnsupportedCheckpointError(f"the image processor has {step} = true, and only false is served")
    size = _square(config.vision_config.image_size, "the vision encoder's image_size")
    height, width = images.size.get("height"), images.size.get("width")
    if height != size or width != size:
        raise CheckpointError(
            f"the image processor makes images of {dict(images.size)}, and the vision encoder reads {size} x {size}"
        )
    if images.resample not in _RESAMPLE:
        raise UnsupportedCheckpointError(
            f"the image processor resamples by filter {images.resample}, and Blipstream knows {_RESAMPLE}"
        )
    return ImageSection(
        size=size,
        mean=_triple(images.image_mean, "image_mean"),
        std=_triple(images.image_std, "image_std"),
        resample=_RESAMPLE[images.resample],
        rescale_factor=float(images.rescale_factor),
    )


def _square(size: Any, what: str) -> int:
    if not isinstance(size, int):
        raise UnsupportedCheckpointError(f"{what} must be one number, the side of a square, but it is {size}")
    return size


def _triple(values: Sequence[float], name: str) -> tuple[float, float, float]:
    if len(values) != 3:
        raise CheckpointError(f"the image processor's {name} must have 3 values, but it has {len(values)}")
    return float(values[0]), float(values[1]), float(values[2])


def _check_loading(info: Mapping[str, Any], folder: Path) -> None:
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"the checkpoint {folder} lacks {_some(missing)} that its configuration asks for")
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, expected = mismatched[0]
        more = f" (and {len(mismatched) - 1} more)" if len(mismatched) > 1 else ""
        raise CheckpointError(
            f"the tensor {name} of {folder} has shape {tuple(found)}, and its configuration asks for "
            f"{tuple(expected)}{more}"
        )


def _some(names: Sequence[str]) -> str:
    listed = ", ".join(names[:3])
    return f"the tensor {listed}" if len(names) == 1 else f"{len(names)} tensors ({listed}{', ...' * (len(names) > 3)})"
