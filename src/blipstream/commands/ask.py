"""The command ``blipstream ask``."""

from __future__ import annotations

from typing import Annotated

import typer

from blipstream.commands.requests import ImageFile, RequestOptions, Template, read_source, session, with_request_options
from blipstream.errors import BlipstreamError


@with_request_options
def ask(
    file: ImageFile,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask about the image.")],
    template: Template = None,
    *,
    options: RequestOptions,
) -> None:
    """Answer a question about an image."""
    with session("ask", options) as running:
        from blipstream_client import question_prompt

        if template is not None:
            question_prompt(question, template)  # one that holds no {} is refused before anything is asked
        try:
            prompt = question_prompt(question, running.client.question_template() if template is None else template)
            running.answer(file, read_source(file), prompt, question=question)
        except BlipstreamError as error:
            running.fail(error, file, question=question)
