"""The tokenizers of a bundle, checked to give the ids that the checkpoint's processor gives.

``tokenizer.json`` is the language model's, ``qformer_tokenizer.json`` that of a Q-Former that reads instructions.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from blipstream.contract import QFORMER_TOKENIZER_FILE, TOKENIZER_FILE
from blipstream.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from blipstream_export.checkpoint import Checkpoint

SAMPLE_PROMPTS = (
    "a photo of",
    "Question: what is in the picture? Answer:",
    " two spaces  and a\nnew line",
    "naïve café, 北京, Ελλάδα, 🙂",
    "0123456789 !?#%&()*+-./:;<=>@[]^_{|}~",
)
"""Prompts with what tokenizers treat differently: spaces, line breaks, accents, other scripts, emoji, punctuation."""


def check_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's tokenizer as one of the ``tokenizers`` library, after it was checked against the language model.

    Raises:
        CheckpointError: it is no tokenizer of this language model, or the library alone does not give its ids.
    """
    tokenizer, config = checkpoint.processor.tokenizer, checkpoint.config
    backend = _backend(tokenizer, "tokenizer", checkpoint)
    _check_vocabulary(tokenizer, config.text_config.vocab_size, checkpoint)
    placeholders: list[int] = []
    if checkpoint.placeholder_id is not None:
        placeholders = [checkpoint.placeholder_id] * checkpoint.num_soft_tokens
    for prompt in SAMPLE_PROMPTS:  # soft tokens' placeholders first, then the text with its special tokens
        expected = processor_ids(checkpoint, prompt)
        _check_ids([*placeholders, *backend.encode(prompt).ids], expected, prompt, TOKENIZER_FILE, checkpoint)
    return backend


def check_qformer_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer of a Q-Former that reads instructions, after it was checked against that Q-Former.

    Raises:
        CheckpointError: it is no tokenizer of this Q-Former, or the ``tokenizers`` library alone does not give its ids.
    """
    tokenizer, config = checkpoint.processor.qformer_tokenizer, checkpoint.config.qformer_config
    backend = _backend(tokenizer, "Q-Former's tokenizer", checkpoint)
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= config.vocab_size:
        raise CheckpointError(
            f"the Q-Former's tokenizer of {checkpoint.folder} is not that of its Q-Former: token {token!r} has id "
            f"{largest}, and the Q-Former's vocab_size is {config.vocab_size}"
        )
    for prompt in ("", *SAMPLE_PROMPTS):
        expected = list(instruction_ids(checkpoint, prompt) or ())
        _check_ids(backend.encode(prompt).ids, expected, prompt, QFORMER_TOKENIZER_FILE, checkpoint)
    return backend


def tokenizer_notes(checkpoint: Checkpoint) -> list[str]:
    """One sentence for each token about which tokenizer and language model disagree, for the terminal.

    It is no fault: the public InstructBLIP with Vicuna has such tokens. What counts are the ids that the processor
    gives, and those that ``generate`` uses.
    """
    tokenizer, text = checkpoint.processor.tokenizer, checkpoint.config.text_config
    notes = []
    for name in ("bos", "eos", "pad"):
        own, expected = getattr(tokenizer, f"{name}_token_id"), getattr(text, f"{name}_token_id", None)
        if own is not None and isinstance(expected, int) and own != expected:
            notes.append(
                f"the tokenizer's {name}_token has id {own}, and the language model's {name}_token_id is {expected}; "
                "each is used as transformers uses it"
            )
    return notes


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write ``tokenizer.json``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")


def _backend(tokenizer: Any, what: str, checkpoint: Checkpoint) -> Tokenizer:
    """A tokenizer of transformers as one of the ``tokenizers`` library, without padding and truncation."""
    from tokenizers import Tokenizer

    if not tokenizer.is_fast:
        raise CheckpointError(
            f"the {what} of {checkpoint.folder} ({type(tokenizer).__name__}) cannot be converted to tokenizer.json"
        )
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy


def _check_vocabulary(tokenizer: Any, vocab_size: int, checkpoint: Checkpoint) -> None:
    side, placeholder_id = checkpoint.family.image_side, checkpoint.placeholder_id
    framed = placeholder_id is not None
    known = {token: index for token, index in tokenizer.get_vocab().items() if framed or token != side.placeholder}
    token, largest = max(known.items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise CheckpointError(
            f"the tokenizer of {checkpoint.folder} is not that of its language model: token {token!r} has id "
            f"{largest}, and the language model's vocab_size is {vocab_size}"
        )
    found = known.get(side.placeholder)
    if framed and found != placeholder_id:
        raise CheckpointError(
            f"the tokenizer of {checkpoint.folder} is not that of its language model: {side.placeholder} has id "
            f"{found}, and the configuration has {side.placeholder_field} = {placeholder_id}"
        )


def _check_ids(found: list[int], expected: list[int], prompt: str, file: str, checkpoint: Checkpoint) -> None:
    """What the processor does, does the library alone do it?"""
    if found != expected:
        raise CheckpointError(
            f"the {file} of {checkpoint.folder} does not give the ids of {type(checkpoint.processor).__name__}: for "
            f"{prompt!r} it gives {found}, and the processor {expected}"
        )


def processor_ids(checkpoint: Checkpoint, prompt: str) -> list[int]:
    """Token ids that the processor makes of an image and ``prompt``; placeholders come first, if it adds any."""
    from PIL import Image

    size = checkpoint.image.size
    placeholders = checkpoint.processor.num_query_tokens is not None
    images = {"images": Image.new("RGB", (size, size))} if placeholders else {}  # some processors add them always
    encoded = checkpoint.processor(text=prompt, **images)
    return [int(token) for token in encoded["input_ids"][0]]


def instruction_ids(checkpoint: Checkpoint, prompt: str) -> tuple[int, ...] | None:
    """Ids of ``prompt`` that the processor makes for the Q-Former; None where it reads no instructions."""
    if not checkpoint.instructed:
        return None
    return tuple(int(token) for token in checkpoint.processor(text=prompt)["qformer_input_ids"][0])
