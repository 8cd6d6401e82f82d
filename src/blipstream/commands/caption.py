"""The command ``blipstream caption``."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import typer

from blipstream.commands.requests import STDIN, RequestOptions, Session, read_source, session, with_request_options
from blipstream.errors import BlipstreamError

_CONCURRENCY = 16
"""Files that are sent at once: the sequences that a bundle decodes at once, by default."""


@with_request_options
def caption(
    files: Annotated[list[str], typer.Argument(metavar="FILE", help="Image files; - reads one from standard input.")],
    prompt: Annotated[str, typer.Option(help="Words that the caption continues.")] = "",
    *,
    options: RequestOptions,
) -> None:
    """Describe images, in the order given."""
    with session("caption", options) as running:
        if len(files) == 1:
            _caption_one(running, files[0], prompt)
        else:
            _caption_all(running, files, prompt)


def _caption_one(running: Session, file: str, prompt: str) -> None:
    try:
        running.answer(file, read_source(file), prompt)
    except BlipstreamError as error:
        running.fail(error, file)


def _caption_all(running: Session, files: Sequence[str], prompt: str) -> None:
    stdin = read_source(STDIN) if STDIN in files else b""
    pool = ThreadPoolExecutor(_CONCURRENCY)
    try:
        answers = [pool.submit(running.generate, stdin if file == STDIN else file, prompt) for file in files]
        for file, answer in zip(files, answers, strict=True):
            try:
                running.show(file, answer.result(), named=True)
            except BlipstreamError as error:
                running.fail(error, file)
    finally:
        # waits for nothing: after an interruption, closing the client ends what is running
        pool.shutdown(wait=False, cancel_futures=True)
