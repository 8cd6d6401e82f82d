"""What ``caption``, ``ask`` and ``chat`` share: their options, the way text and errors are shown, the exit status.

Importing it is cheap, and works without the client extra: the client comes with the command's run.
"""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from blipstream.commands.options import with_options
from blipstream.errors import BlipstreamError
from blipstream.extras import needing

if TYPE_CHECKING:
    from blipstream_client import Client, Generation

STDIN = "-"
"""File name by which an image is read from standard input."""

_CONTROL = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
"""Characters by which a text could do more to a terminal than appear on it."""

_NOT_DECODING = frozenset({"url", "json_lines", "timeout"})

ImageFile = Annotated[str, typer.Argument(metavar="FILE", help="An image file; - reads it from standard input.")]
Template = Annotated[
    str | None,
    typer.Option(
        help="What a question is put into, in place of {}; '{}' alone sends it as it is.",
        show_default="as the served checkpoint was shown questions",
    ),
]


@dataclass(frozen=True)
class RequestOptions:
    """The options that the commands have in common; None leaves a choice to the checkpoint or the client."""

    url: Annotated[
        str | None,
        typer.Option(
            envvar="BLIPSTREAM_URL",
            metavar="HOST:PORT",
            help="The server's gRPC endpoint.",
            show_default="localhost:8001",
        ),
    ] = None
    json_lines: Annotated[bool, typer.Option("--json", help="Write one JSON object a line for each answer.")] = False
    timeout: Annotated[float, typer.Option(min=0, help="Seconds that an answer may take.")] = 300.0
    max_tokens: Annotated[int | None, typer.Option(help="Tokens to generate at most.")] = None
    min_tokens: Annotated[int | None, typer.Option(help="Tokens to generate before the text may end.")] = None
    temperature: Annotated[float | None, typer.Option(help="Divides the logits; 0 is greedy.")] = None
    top_k: Annotated[int | None, typer.Option(help="Sample among the k likeliest tokens; 0 keeps all.")] = None
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the likeliest tokens whose probability reaches p.")
    ] = None
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1, makes tokens already seen less likely.")
    ] = None
    seed: Annotated[int | None, typer.Option(help="Seed of the samples.")] = None
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the text; may be repeated.")] = None

    def decoding(self) -> dict[str, Any]:
        """The decoding options that were given, by the client's names."""
        return {
            name: value for name, value in asdict(self).items() if name not in _NOT_DECODING and value not in (None, [])
        }


with_request_options = with_options(RequestOptions)
"""Gives a command, in place of its last parameter ``options``, the options of :class:`RequestOptions`."""


class Session:
    """A client, and the terminal or pipe that its answers go to; remembers whether anything failed."""

    def __init__(self, command: str, client: Client, options: RequestOptions) -> None:
        self.client = client
        self.any_failed = False
        self._command = command
        self._json = options.json_lines
        self._decoding = options.decoding()
        self._out = Console()

    def generate(self, image: str | bytes, prompt: str) -> Answer:
        """Generate a whole text without showing it; may be called by several threads at once."""
        started = time.perf_counter()
        generation = self.client.generate(image, prompt, **self._decoding)
        return Answer(generation, time.perf_counter() - started)

    def answer(self, file: str, image: str | bytes, prompt: str, **fields: Any) -> str:
        """Generate a text and show it, piece by piece as it comes; returns the whole.

        ``fields`` are added to the JSON object. Raises what the client raises.
        """
        if self._json:
            answer = self.generate(image, prompt)
            self.show(file, answer, **fields)
            return answer.generation.text
        text = ""
        with self.client.stream(image, prompt, **self._decoding) as chunks:
            try:
                for chunk in chunks:
                    text += chunk.text
                    self._write(chunk.text)
            finally:
                if text or sys.exc_info()[0] is None:
                    self._write("\n")
        return text

    def show(self, file: str, answer: Answer, *, named: bool = False, **fields: Any) -> None:
        """Show a whole text, on a terminal or in a pipe after its file's name if it is to be ``named``."""
        if self._json:
            self._write_json({"file": printable(file), **fields, **answer.fields()})
            return
        if named:
            self._write(f"{printable(file)}: ", style="cyan")
        self._write(answer.generation.text + "\n")

    def fail(self, error: Exception, file: str | None = None, **fields: str) -> None:
        """Report a failure, by the name of the file that it belongs to, and go on."""
        self.any_failed = True
        if self._json and file is not None:
            self._write_json({"file": printable(file), **fields, "error": str(error)})
        elif file is None or repr(file) in str(error):
            complain(self._command, str(error))
        else:
            complain(self._command, f"{printable(file)}: {error}")

    def note(self, message: str) -> None:
        """Say something that is neither an answer nor a failure."""
        Console(stderr=True).out(message, style="dim", highlight=False)

    def _write_json(self, fields: dict[str, object]) -> None:
        typer.echo(json.dumps(fields))

    def _write(self, text: str, style: str | None = None) -> None:
        """Write at once: to a pipe the text as it is, to a terminal without what would move the cursor."""
        if self._out.is_terminal:
            self._out.out(text.translate(_CONTROL), style=style, end="", highlight=False)
        else:
            typer.echo(text, nl=False)


@dataclass(frozen=True)
class Answer:
    """A whole text, and the seconds from the request to its end."""

    generation: Generation
    seconds: float

    def fields(self) -> dict[str, object]:
        """What the JSON object says of it."""
        names = ("text", "finish_reason", "num_input_tokens", "num_output_tokens")
        return {**{name: getattr(self.generation, name) for name in names}, "seconds": round(self.seconds, 4)}


@contextmanager
def session(command: str, options: RequestOptions) -> Iterator[Session]:
    """A session with the server, at whose end the process exits with status 1 if anything failed."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # what its encoding lacks must not end a batch
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _connect(options) as client:
            running = Session(command, client, options)
            yield running
    except BlipstreamError as error:
        complain(command, str(error))
        raise typer.Exit(1) from None
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would fail to flush it at its end
        complain(command, f"the answer cannot be written: {error.strerror or error}")
        raise typer.Exit(1) from None
    if running.any_failed:
        raise typer.Exit(1)


def _connect(options: RequestOptions) -> Client:
    with needing("client"):
        from blipstream_client import DEFAULT_URL, Client
    return Client(DEFAULT_URL if options.url is None else options.url, timeout=options.timeout)


def complain(command: str, message: str) -> None:
    """Write an error, with the name of the command, to standard error."""
    Console(stderr=True).out(printable(f"blipstream {command}: {message}"), style="red", highlight=False)


def read_source(file: str) -> str | bytes:
    """What the client is given for a file name: the bytes of standard input, or the name."""
    return typer.get_binary_stream("stdin").read() if file == STDIN else file


def printable(file: str) -> str:
    """A file name that any terminal can show; what is not UTF-8, or a control character, is replaced."""
    return os.fsencode(file).decode("utf-8", "replace").translate(_CONTROL)
