"""How answers appear: as text on a terminal or in a pipe, or as JSON lines."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from blipstream.commands.shared import show_error
from blipstream.errors import BlipstreamError

if TYPE_CHECKING:
    from blipstream_client import Generation


class Writer(Protocol):
    """Takes the answers in their order: ``piece`` any number of times, then ``answer`` or ``error``."""

    def piece(self, name: str, text: str) -> None:
        """More text of the answer for the image ``name``."""
        ...

    def answer(self, name: str, generation: Generation, seconds: float) -> None:
        """The answer is complete."""
        ...

    def error(self, name: str, error: BlipstreamError, seconds: float) -> None:
        """There is no answer, or no more of it."""
        ...


class TextWriter:
    """One line for each answer, written as it comes; white space within it becomes one space.

    Args:
        command: begins the lines of errors.
        show_names: whether the image's name begins the line.
    """

    def __init__(self, command: str, *, show_names: bool) -> None:
        self._command = command
        self._show_names = show_names
        self._console = Console(highlight=False, soft_wrap=True)
        self._errors = Console(stderr=True)
        self._line = Line()

    def piece(self, name: str, text: str) -> None:
        """Write what is new."""
        words = self._line.add(text)
        if words:
            self._write(name, words)

    def answer(self, name: str, generation: Generation, seconds: float) -> None:
        """End the line."""
        if not self._line.begun:
            self._write(name, "")
        self._end_line()

    def error(self, name: str, error: BlipstreamError, seconds: float) -> None:
        """Write the error where errors go."""
        if self._line.begun:
            self._end_line()
        show_error(self._errors, f"blipstream {self._command}: {name}: {error}")

    def _write(self, name: str, text: str) -> None:
        if self._show_names and not self._line.begun:
            self._console.print(f"{name}: ", style="bold", end="", markup=False)
        self._line.begun = True
        self._console.print(text, end="", markup=False)

    def _end_line(self) -> None:
        self._console.print()
        self._line = Line()


class Line:
    """Turns text that comes in pieces into one line: no white space around it, single spaces within it."""

    def __init__(self) -> None:
        self.begun = False
        """For the owner: whether anything was written."""
        self._has_words = False
        self._space = False

    def add(self, text: str) -> str:
        """What can be written now; white space at the end waits for what follows."""
        words = " ".join(text.split())
        if not words:
            self._space = self._space or bool(text)
            return ""
        spaced = self._has_words and (self._space or text[0].isspace())
        self._has_words = True
        self._space = text[-1].isspace()
        return f" {words}" if spaced else words


class JsonWriter:
    """One JSON object a line for each answer or error."""

    def piece(self, name: str, text: str) -> None:
        """Nothing: a line is written when it is whole."""

    def answer(self, name: str, generation: Generation, seconds: float) -> None:
        """Write the answer; white space around the text is left out."""
        self.write(
            file=name,
            text=generation.text.strip(),
            finish_reason=generation.finish_reason,
            num_input_tokens=generation.num_input_tokens,
            num_output_tokens=generation.num_output_tokens,
            seconds=round(seconds, 6),
        )

    def error(self, name: str, error: BlipstreamError, seconds: float) -> None:
        """Write the error's kind and message."""
        fault = {"type": type(error).__name__, "message": str(error)}
        self.write(file=name, error=fault, seconds=round(seconds, 6))

    @staticmethod
    def write(**fields: Any) -> None:
        """Write one object."""
        print(json.dumps(fields, ensure_ascii=False), flush=True)
