"""The command ``blipstream caption``. Importing it is cheap: the client comes with the command's run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from blipstream.commands.shared import DEFAULT_URL, Json, Timeout, Url, reporting, takes_decoding_options


@takes_decoding_options
def caption(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Images; - reads one from standard input.")],
    url: Url = DEFAULT_URL,
    as_json: Json = False,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="How the caption begins.")] = "",
    concurrency: Annotated[int, typer.Option(min=1, help="Images that are sent at once.")] = 16,
    timeout: Timeout = None,
    *,
    decoding: Mapping[str, Any],
) -> None:
    """Describe images. Exits with status 1 when any of them failed; the others are described all the same."""
    with reporting("caption"):
        from blipstream.commands.answering import Task, answer_all
        from blipstream.commands.writers import JsonWriter, TextWriter

        writer = JsonWriter() if as_json else TextWriter("caption", show_names=len(files) > 1)
        failures = answer_all(files, Task(url, prompt, decoding, timeout, concurrency), writer)
    if failures:
        raise typer.Exit(1)
