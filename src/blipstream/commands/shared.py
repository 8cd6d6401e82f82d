"""What the commands that talk to a server share: their options, and how an error ends them. Importing it is cheap."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

from blipstream.errors import BlipstreamError

DEFAULT_URL = "localhost:8001"

Url = Annotated[
    str, typer.Option("--url", envvar="BLIPSTREAM_URL", metavar="HOST:PORT", help="The server's gRPC endpoint.")
]
Json = Annotated[bool, typer.Option("--json", help="Write one JSON object a line, for programs.")]
Template = Annotated[
    str, typer.Option(metavar="TEXT", help='Prompt that holds the question at {}; "{}" sends it as it is.')
]
Timeout = Annotated[float | None, typer.Option(min=0.0, help="Seconds that one answer may take.")]

_CLIENT_PACKAGES = ("google", "grpc", "tritonclient")


def takes_decoding_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of :func:`_decoding`; it receives those that were given as the mapping ``decoding``."""
    own = inspect.signature(command, eval_str=True)
    shared = inspect.signature(_decoding, eval_str=True)

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in shared.parameters}
        command(**arguments, decoding={name: value for name, value in given.items() if value not in (None, [])})

    mine = [parameter for parameter in own.parameters.values() if parameter.name != "decoding"]
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*mine, *shared.parameters.values())]
    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _decoding(
    max_tokens: Annotated[int | None, typer.Option(help="Tokens to generate at most.")] = None,
    min_tokens: Annotated[int | None, typer.Option(help="Tokens to generate before the text may end.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Sample; higher is more varied, 0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the likeliest tokens, to this probability.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: repeat less.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the samples, to get the same text again.")] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End at this text; may be repeated.")] = None,
) -> None:
    """Options that the server reads; by the names that :class:`blipstream_client.DecodingOptions` gives them."""


@contextmanager
def reporting(command: str) -> Iterator[None]:
    """Let an error of Blipstream end the command with one line and status 1, as a missing package does."""
    try:
        yield
    except BlipstreamError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _CLIENT_PACKAGES:
            raise
        message = f"{error.name} is not installed: talking to a server needs blipstream[client]"
    else:
        return
    show_error(Console(stderr=True), f"blipstream {command}: {message}")
    raise typer.Exit(1)


def show_error(console: Console, message: str) -> None:
    """Print one error on its own line."""
    console.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
