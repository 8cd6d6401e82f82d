"""Opening a checkpoint: found, whole, of a kind that is served, and consistent, or refused in one sentence.

:func:`open_checkpoint` reads configuration files and the headers of the weights alone; :func:`load_model` reads the
weights. In between, nothing has been computed and little has been read, so that a fault costs seconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blipstream.contract import DecoderSection, ImageSection
from blipstream.errors import CheckpointError, UnsupportedCheckpointError
from blipstream_export.families import Family, LanguageModule, find_family
from blipstream_export.generation import empty_prompt_ids, is_token
from blipstream_export.weights import TensorHeader, read_headers, read_json

CONFIG_FILE = "config.json"
PLACEHOLDER = "<image>"
"""The token that stands for one soft token in a prompt's ids."""

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model", "vocab.txt")
_QFORMER_TOKENIZER = "qformer_tokenizer"
_QFORMER_TOKENIZER_FILES = (f"{_QFORMER_TOKENIZER}/tokenizer.json", f"{_QFORMER_TOKENIZER}/vocab.txt")
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_RESAMPLE: dict[int, Any] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are all there, and what they say; no weights are loaded."""

    folder: Path
    name: str
    """The folder's name, or the hub id."""
    family: Family
    config: Any
    """The configuration in transformers, with ``num_query_tokens`` and ``image_token_index`` filled in where an old one
    lacks them; the latter stays None where the language model has no row for the placeholder ``<image>``."""
    processor: Any
    """The processor in transformers. It puts ``num_query_tokens`` placeholders before a prompt, unless
    ``image_token_index`` is None."""
    image: ImageSection

    @property
    def instructed(self) -> bool:
        """Whether its Q-Former reads the prompt as well."""
        return self.family.image_side.instructed

    @property
    def language(self) -> LanguageModule:
        """What is particular to its language model."""
        return self.family.language.load()

    def decoder_section(self, *, max_sequences: int, max_tokens: int) -> DecoderSection:
        """The language model's sizes, with a KV cache of ``max_sequences`` rows of ``max_tokens`` tokens."""
        return self.language.decoder_section(
            self.config.text_config, max_sequences=max_sequences, max_tokens=max_tokens
        )


def open_checkpoint(source: str) -> Checkpoint:
    """Open a folder or a hub id in the Hugging Face layout.

    Raises:
        UnsupportedCheckpointError: a kind of checkpoint, or a configuration, that is not served.
        CheckpointError: files are missing, truncated or inconsistent.
    """
    folder = _locate(source)
    name = folder.name if Path(source).exists() else source
    raw = read_json(folder / CONFIG_FILE)
    family = find_family(raw, source)
    headers = read_headers(folder)
    with _faults_of(f"the configuration {folder / CONFIG_FILE}"):
        import transformers

        config = getattr(transformers, family.image_side.config).from_pretrained(folder)
    config.num_query_tokens = _num_query_tokens(raw, headers, folder)
    processor = _load_processor(folder, family)
    _frame(processor, config, folder)
    checkpoint = Checkpoint(folder, name, family, config, processor, _image_section(processor, config))
    _check_text_config(checkpoint, source)
    return checkpoint


def load_model(checkpoint: Checkpoint) -> Any:
    """Load the weights in fp32, for inference, into the model of transformers.

    Raises:
        CheckpointError: a tensor is missing or of another shape than the configuration says.
    """
    import torch
    import transformers

    architecture = getattr(transformers, checkpoint.family.image_side.architecture)
    with _faults_of(f"the weights of {checkpoint.folder}"):
        loaded: Any = architecture.from_pretrained(
            checkpoint.folder,
            config=checkpoint.config,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, all of them together
            output_loading_info=True,
        )
    model, info = loaded
    _check_loading(info, checkpoint.folder)
    return model.eval().requires_grad_(False)


def _locate(source: str) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise CheckpointError(
            f"{source} is a file, but a checkpoint is a folder in the Hugging Face layout or a hub id"
        )
    if not _HUB_ID.fullmatch(source):
        raise CheckpointError(f"there is no folder {source}, and a hub id would read owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(_HUB_FILES)))
    except (OSError, ValueError, RuntimeError) as error:  # what huggingface_hub and its HTTP client raise
        raise CheckpointError(
            f"there is no folder {source}, and the hub did not give a checkpoint of that id: {_sentence(error)}"
        ) from error


def _num_query_tokens(raw: Mapping[str, Any], headers: Mapping[str, TensorHeader], folder: Path) -> int:
    header = headers.get("query_tokens")
    if header is None or len(header.shape) != 3:
        raise CheckpointError(f"the checkpoint {folder} lacks the tensor query_tokens (1, number of queries, width)")
    declared = raw.get("num_query_tokens")
    if declared is not None and declared != header.shape[1]:
        raise CheckpointError(
            f"the configuration of {folder} declares num_query_tokens = {declared}, but the tensor query_tokens holds "
            f"{header.shape[1]}"
        )
    return int(header.shape[1])


def _load_processor(folder: Path, family: Family) -> Any:
    import transformers

    expected = [("tokenizer", _TOKENIZER_FILES), ("image processor", _PROCESSOR_FILES)]
    if family.image_side.instructed:
        expected.append(("tokenizer of the Q-Former", _QFORMER_TOKENIZER_FILES))
    for what, files in expected:
        if not any((folder / name).is_file() for name in files):  # transformers would make one up
            raise CheckpointError(f"the checkpoint {folder} holds no {what}: expected one of {', '.join(files)}")
    with _faults_of(f"the tokenizer and image processor of {folder}"):
        processor = getattr(transformers, family.image_side.processor).from_pretrained(folder, local_files_only=True)
    if family.image_side.instructed:  # transformers takes the language model's where this one cannot be read
        own = folder / _QFORMER_TOKENIZER
        with _faults_of(f"the tokenizer of the Q-Former in {own}"):
            processor.qformer_tokenizer = transformers.AutoTokenizer.from_pretrained(own, local_files_only=True)
    return processor


def _frame(processor: Any, config: Any, folder: Path) -> None:
    """Agree on the placeholder of soft tokens and on their number; old checkpoints leave both to the code."""
    declared = processor.num_query_tokens
    if declared is not None and declared != config.num_query_tokens:
        raise CheckpointError(
            f"the processor of {folder} declares num_query_tokens = {declared}, but the tensor query_tokens holds "
            f"{config.num_query_tokens}"
        )
    if config.image_token_index is None:
        config.image_token_index = _placeholder_id(processor, config)
    processor.num_query_tokens = None if config.image_token_index is None else config.num_query_tokens


def _placeholder_id(processor: Any, config: Any) -> int | None:
    """The id of ``<image>`` for a configuration that names none, if the language model has a row for it."""
    token = processor.tokenizer.convert_tokens_to_ids(PLACEHOLDER)
    known = isinstance(token, int) and token != processor.tokenizer.unk_token_id
    return token if known and token < config.text_config.vocab_size else None


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
    sides = {int(size)} if isinstance(size, int) else {int(side) for side in size}
    if len(sides) != 1:
        raise UnsupportedCheckpointError(f"{what} must be square, but it is {size}")
    return sides.pop()


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


@contextmanager
def _faults_of(what: str) -> Iterator[None]:
    """Whatever transformers raises on damaged files becomes one sentence; it raises nearly every built-in exception."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(f"{what} cannot be loaded: {_sentence(error)}") from error


def _sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__
