"""The command ``blipstream ask``. Importing it is cheap: the client comes with the command's run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from blipstream.commands.shared import (
    DEFAULT_URL,
    QUESTION_TEMPLATE,
    Json,
    Template,
    Timeout,
    Url,
    reporting,
    takes_decoding_options,
)


@takes_decoding_options
def ask(
    file: Annotated[str, typer.Argument(metavar="FILE", help="An image; - reads it from standard input.")],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask about it.")],
    url: Url = DEFAULT_URL,
    as_json: Json = False,
    template: Template = QUESTION_TEMPLATE,
    timeout: Timeout = None,
    *,
    decoding: Mapping[str, Any],
) -> None:
    """Answer a question about an image."""
    with reporting("ask"):
        from blipstream.commands.answering import Task, answer_all
        from blipstream.commands.writers import JsonWriter, TextWriter
        from blipstream_client import question_prompt

        writer = JsonWriter() if as_json else TextWriter("ask", show_names=False)
        task = Task(url, question_prompt(question, template), decoding, timeout, concurrency=1)
        failures = answer_all([file], task, writer)
    if failures:
        raise typer.Exit(1)
