"""What the clients answer: pieces of a streamed text, and the whole."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

FinishReason = Literal["eos", "length", "stop", "cancelled"]
"""Why a text ended: an end token, ``max_tokens`` or a full KV cache, a stop string, a cancelled request."""


@dataclass(frozen=True)
class TextChunk:
    """The text since the last chunk of a stream."""

    text: str
    """May be empty; the chunks' texts joined are the whole text, without white space around it."""
    finish_reason: FinishReason | None
    """Set in the last chunk alone."""
    num_input_tokens: int
    """Soft tokens of the image and tokens of the prompt."""
    num_output_tokens: int
    """Tokens generated so far, the end token included."""
    token_ids: tuple[int, ...] = ()
    """Ids of the tokens since the last chunk, the end token included."""
    log_probs: tuple[float, ...] = ()
    """Natural logarithm of the probability of each token since the last chunk, if asked for."""

    @property
    def is_last(self) -> bool:
        """Whether the text ends with this chunk."""
        return self.finish_reason is not None


class Trimmer:
    """Removes the white space around a streamed text; within it, white space waits for what follows.

    The reference usage of BLIP-2 strips the decoded text. Token ids stay as they are.
    """

    def __init__(self) -> None:
        self._pending = ""
        self._begun = False

    def trim(self, chunk: TextChunk) -> TextChunk:
        """The next chunk, with what of the text can be shown now."""
        text = self._pending + chunk.text
        shown = text.rstrip()
        self._pending = text[len(shown) :]
        text = shown if self._begun else shown.lstrip()
        self._begun = self._begun or bool(shown)
        return replace(chunk, text=text)


@dataclass(frozen=True)
class Generation:
    """A whole generated text."""

    text: str
    """Without white space around it."""
    finish_reason: FinishReason
    num_input_tokens: int
    """Soft tokens of the image and tokens of the prompt."""
    num_output_tokens: int
    """Tokens generated, the end token included."""
    token_ids: tuple[int, ...] = ()
    """Ids of the generated tokens, the end token included."""
    log_probs: tuple[float, ...] = ()
    """Natural logarithm of the probability of each generated token, if asked for."""

    @classmethod
    def join(cls, chunks: list[TextChunk]) -> Generation:
        """The whole of a stream's chunks; the last of them must be the stream's last.

        Raises:
            ValueError: the last chunk carries no finish reason, or there is none.
        """
        if not chunks or chunks[-1].finish_reason is None:
            raise ValueError("the chunks of a whole text end with one that has a finish_reason, but these do not")
        last = chunks[-1]
        return cls(
            text="".join(chunk.text for chunk in chunks),
            finish_reason=chunks[-1].finish_reason,
            num_input_tokens=last.num_input_tokens,
            num_output_tokens=last.num_output_tokens,
            token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
            log_probs=tuple(value for chunk in chunks for value in chunk.log_probs),
        )
