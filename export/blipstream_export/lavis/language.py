"""The language model of a LAVIS checkpoint: a folder in the Hugging Face layout, set up as LAVIS sets it up.

Its weights may be safetensors, or pickles (``pytorch_model.bin``), as which OPT's were published; pickles are read as
LAVIS's own files are, without running code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from blipstream.errors import CheckpointError, UnsupportedCheckpointError
from blipstream_export.faults import faults_of
from blipstream_export.files import read_json
from blipstream_export.lavis.files import read_tensors
from blipstream_export.location import CONFIG_FILE
from blipstream_export.processors import check_files
from blipstream_export.weights import INDEX_FILE, WEIGHTS_FILE, indexed_files, read_headers, weight_files

PREFIX = "language_model."
"""What stands before a language model's names in a composed checkpoint."""

_END = "</s>"
_PICKLE = "pytorch_model.bin"
_INDEX = "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class LanguagePart:
    """A language model's configuration and tokenizer in transformers."""

    folder: Path
    config: Any
    tokenizer: Any
    notes: tuple[str, ...]

    def tensors(self) -> dict[str, Tensor]:
        """Its weights, by their names in a composed checkpoint; mapped from disk.

        Raises:
            CheckpointError: files are missing or damaged.
        """
        tensors: dict[str, Tensor] = {}
        for path, read in _weight_files(self.folder):
            tensors |= {PREFIX + self._name(name): tensor for name, tensor in read(path).items()}
        return tensors

    def _name(self, name: str) -> str:
        # OPT's first checkpoints were saved from the model without its head
        return f"model.{name}" if self.config.model_type == "opt" and name.startswith("decoder.") else name


def read_language_model(folder: Path) -> LanguagePart:
    """Read configuration and tokenizer, and set them up.

    Raises:
        UnsupportedCheckpointError: LAVIS composes no checkpoint with a language model of this kind.
        CheckpointError: files are missing or damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder, and a language model in the Hugging Face layout was expected there"
        )
    model_type = read_json(folder / CONFIG_FILE).get("model_type")
    if not isinstance(model_type, str) or model_type not in _SET_UP:
        raise UnsupportedCheckpointError(
            f"{folder} is a language model of type {model_type!r}, and LAVIS's checkpoints are composed with one of "
            f"{', '.join(map(repr, _SET_UP))}"
        )
    _weight_files(folder)
    check_files(folder, "tokenizer")
    from transformers import AutoConfig, AutoTokenizer

    with faults_of(f"the configuration and tokenizer of {folder}"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return LanguagePart(folder, config, tokenizer, _SET_UP[model_type](config, tokenizer))


def _weight_files(folder: Path) -> list[tuple[Path, Callable[[Path], dict[str, Tensor]]]]:
    """Every file of weights, with what reads it.

    Raises:
        CheckpointError: files are missing or damaged.
    """
    from safetensors.torch import load_file

    if not any((folder / name).is_file() for name in (INDEX_FILE, WEIGHTS_FILE)):
        for pickle in (_INDEX, _PICKLE):
            if (folder / pickle).is_file():
                paths = indexed_files(folder / pickle) if pickle == _INDEX else [folder / pickle]
                return [(path, read_tensors) for path in paths]
    read_headers(folder)  # it refuses what is missing or damaged
    return [(path, load_file) for path in weight_files(folder)]


def _set_up_opt(config: Any, tokenizer: Any) -> tuple[str, ...]:
    """LAVIS trains OPT to end a text with a line break, and takes its first token for the end token."""
    config.eos_token_id = int(tokenizer("\n", add_special_tokens=False)["input_ids"][0])
    return (f"answers end at a line break (token {config.eos_token_id}), which LAVIS trains OPT for, and not at </s>",)


def _set_up_llama(config: Any, tokenizer: Any) -> tuple[str, ...]:
    """LAVIS lets ``</s>`` begin a text, which LLaMA's own tokenizer begins with ``<s>``."""
    from tokenizers.processors import TemplateProcessing

    token = tokenizer.convert_tokens_to_ids(_END)
    if not isinstance(token, int) or token == tokenizer.unk_token_id:
        raise CheckpointError(
            f"the tokenizer of {tokenizer.name_or_path} has no token {_END}, which begins a text of LLaMA in LAVIS"
        )
    tokenizer.bos_token, config.bos_token_id = _END, token
    framing = TemplateProcessing(single=f"{_END} $A", special_tokens=[(_END, token)])
    tokenizer.backend_tokenizer.post_processor = framing
    return (f"prompts begin with {_END}, as LAVIS sets it for LLaMA",)


def _set_up_t5(config: Any, _tokenizer: Any) -> tuple[str, ...]:
    """LAVIS computes T5's activation exactly, and its empty prompt is the end token alone."""
    config.dense_act_fn = "gelu"
    config.bos_token_id = config.eos_token_id
    return ("T5's feed-forward layers use the exact GELU, as LAVIS sets it",)


_SET_UP: Mapping[str, Callable[[Any, Any], tuple[str, ...]]] = {
    "opt": _set_up_opt,
    "llama": _set_up_llama,
    "t5": _set_up_t5,
}
