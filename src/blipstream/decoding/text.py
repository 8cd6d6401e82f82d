"""From text to token ids and back: encoding, incremental decoding, stop strings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

from blipstream.errors import BundleError

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """The language model's tokenizer (``tokenizers`` library). Safe to use from several threads."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a ``tokenizer.json``.

        Raises:
            BundleError: no such file, or not a tokenizer.
        """
        if not path.is_file():
            raise BundleError(f"there is no tokenizer at {path}")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"{path} is not a tokenizer: {error}") from error

    def encode(self, text: str, *, special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a text; with ``special_tokens``, the ones that the tokenizer puts around a text as well."""
        return tuple(self._backend.encode(text, add_special_tokens=special_tokens).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the tokens, special tokens left out."""
        return str(self._backend.decode(token_ids, skip_special_tokens=True))

    def word_sequences(self, words: Iterable[str]) -> list[tuple[int, ...]]:
        """Token sequences that spell each word, at the start of a text and after a space."""
        spellings = (self.encode(prefix + word, special_tokens=False) for word in words for prefix in ("", " "))
        return [ids for ids in dict.fromkeys(spellings) if ids]


class TextStream:
    """The text of one sequence, released as it becomes certain.

    The released pieces add up to ``Tokenizer.decode`` of all tokens, or to what comes before the first stop string in
    it. Held back are: tokens that end in the middle of a character, and text that may be the beginning of a stop
    string. (One exception, which text of a working model does not meet: a decoder of single bytes beside pieces, as
    LLaMA's, gives up a whole run of bytes for the first of them that is not UTF-8; here, whole characters before it
    are out by then.)
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._pieces = _TokenPieces(tokenizer)
        self._stop = stop
        self._held = ""
        self.stopped = False
        """Whether a stop string has appeared. Nothing is released after it."""

    def push(self, token_id: int) -> str:
        """Add a token; return the text that has become certain, which may be empty."""
        return self._release(self._pieces.push(token_id))

    def flush(self) -> str:
        """End the text; return what was held back."""
        text = self._release(self._pieces.flush())
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        if not self._stop:
            return text
        text = self._held + text
        ends = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)[1]]  # the stop string that was complete first, however the text was cut into tokens
        keep = self._open_length(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _open_length(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop string begins."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0


class _TokenPieces:
    """Turns tokens into pieces of text, each of whole characters.

    A window of recent tokens is decoded at each step. Its first part, whose text has been released, gives the rest
    the context that some decoders need (a leading space kept or dropped).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._num_released = 0
        self._released = ""

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        if text.endswith(_REPLACEMENT) or len(text) <= len(self._released):
            return ""  # in the middle of a character, or a token without text
        return self._advance(text)

    def flush(self) -> str:
        return self._advance(self._tokenizer.decode(self._window))

    def _advance(self, text: str) -> str:
        piece = text[len(self._released) :]
        self._window = self._window[self._num_released :]
        self._num_released = len(self._window)
        self._released = self._tokenizer.decode(self._window)
        return piece
