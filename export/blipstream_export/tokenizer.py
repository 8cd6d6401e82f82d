"""The tokenizer of a bundle: ``tokenizer.json``, checked to give the ids that the checkpoint's processor gives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from blipstream.errors import CheckpointError
from blipstream_export.checkpoint import PLACEHOLDER

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
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"the tokenizer of {checkpoint.folder} ({type(tokenizer).__name__}) cannot be converted to tokenizer.json"
        )
    vocab_size = config.text_config.vocab_size
    _check_vocabulary(tokenizer, vocab_size, checkpoint)
    backend = _copy(tokenizer.backend_tokenizer)
    _check_framing(backend, checkpoint)
    return backend


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write ``tokenizer.json``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")


def _copy(backend: Tokenizer) -> Tokenizer:
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy


def _check_vocabulary(tokenizer: Any, vocab_size: int, checkpoint: Checkpoint) -> None:
    framed = checkpoint.config.image_token_index is not None
    known = {token: index for token, index in tokenizer.get_vocab().items() if framed or token != PLACEHOLDER}
    token, largest = max(known.items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise CheckpointError(
            f"the tokenizer of {checkpoint.folder} is not that of its language model: token {token!r} has id "
            f"{largest}, and the language model's vocab_size is {vocab_size}"
        )
    text = checkpoint.config.text_config
    for name in ("bos", "pad"):
        own, expected = getattr(tokenizer, f"{name}_token_id"), getattr(text, f"{name}_token_id")
        if own is not None and expected is not None and own != expected:
            raise CheckpointError(
                f"the tokenizer of {checkpoint.folder} is not that of its language model: its {name}_token has id "
                f"{own}, and the language model's {name}_token_id is {expected}"
            )
    placeholder, expected = known.get(PLACEHOLDER), checkpoint.config.image_token_index
    if framed and placeholder != expected:
        raise CheckpointError(
            f"the tokenizer of {checkpoint.folder} is not that of its language model: {PLACEHOLDER} has id "
            f"{placeholder}, and the configuration has image_token_index = {expected}"
        )


def _check_framing(backend: Tokenizer, checkpoint: Checkpoint) -> None:
    """Soft tokens' placeholders first, then the text with its special tokens: what the processor does, is it so?"""
    processor, config = checkpoint.processor, checkpoint.config
    placeholders: list[int] = []
    if config.image_token_index is not None:
        placeholders = [config.image_token_index] * config.num_query_tokens
    for prompt in SAMPLE_PROMPTS:
        expected = processor_ids(checkpoint, prompt)
        found = [*placeholders, *backend.encode(prompt).ids]
        if found != expected:
            raise CheckpointError(
                f"the tokenizer.json of {checkpoint.folder} does not give the ids of {type(processor).__name__}: for "
                f"{prompt!r} it gives {found}, and the processor {expected}"
            )


def processor_ids(checkpoint: Checkpoint, prompt: str) -> list[int]:
    """Token ids that the processor makes of an image and ``prompt``; placeholders come first, if it adds any."""
    from PIL import Image

    size = checkpoint.image.size
    encoded = checkpoint.processor(images=Image.new("RGB", (size, size)), text=prompt)
    return [int(token) for token in encoded["input_ids"][0]]
