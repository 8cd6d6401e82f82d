"""The command ``blipstream chat``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from blipstream.commands.requests import (
    STDIN,
    ImageFile,
    RequestOptions,
    Session,
    Template,
    session,
    with_request_options,
)
from blipstream.errors import BlipstreamError, InvalidRequestError, RequestRefusedError

if TYPE_CHECKING:
    from blipstream_client import Conversation

_HELP = """\
/image FILE  talk about another image
/reset       forget what was said
/help        show this
/quit        leave; so does the end of the input
Ctrl-C during an answer cancels it."""


@with_request_options
def chat(file: ImageFile, template: Template = None, *, options: RequestOptions) -> None:
    """Ask several questions about an image, each with what was said before; one a line, /help lists the commands."""
    with session("chat", options) as running:
        from blipstream_client import Conversation

        conversation = Conversation(running.client.question_template() if template is None else template)
        conversation.prompt("")  # a template that holds no {} is refused before anything is asked
        _Chat(running, conversation, file).run()


class _Chat:
    """The image and the turns of a chat. The turns change with a complete answer, and at no other time."""

    def __init__(self, running: Session, conversation: Conversation, file: str) -> None:
        self._session = running
        self._conversation = conversation
        self._file = file
        self._image = _read(file)

    def run(self) -> None:
        """Answer lines until the input ends."""
        for line in _lines():
            if line == "/quit":
                return
            try:
                if line.startswith("/"):
                    self._command(line)
                else:
                    self._answer(line)
            except KeyboardInterrupt:
                self._session.note("The answer was cancelled.")

    def _command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        try:
            if name == "/image":
                if not argument:
                    raise InvalidRequestError("/image needs the file to talk about: /image FILE")
                self._image, self._file = _read(argument.strip()), argument.strip()
                self._conversation.reset()
            elif name == "/reset":
                self._conversation.reset()
            elif name == "/help":
                self._session.note(_HELP)
            else:
                raise InvalidRequestError(
                    f"a line that begins with / must be one of the commands of /help, but it is {line!r}"
                )
        except BlipstreamError as error:
            self._session.fail(error)

    def _answer(self, question: str) -> None:
        try:
            answer, forgotten = self._ask(question)
        except BlipstreamError as error:
            self._session.fail(error, self._file, question=question)
            return
        for _ in range(forgotten):
            self._conversation.forget_oldest()
        self._conversation.add(question, answer)
        if forgotten:
            self._session.note(
                f"The conversation grew too long for the model; turns forgotten, oldest first: {forgotten}."
            )

    def _ask(self, question: str) -> tuple[str, int]:
        """The answer, and how many of the oldest turns had to be left out of the prompt.

        Whatever else a server may refuse it refuses without the turns as well, so no refusal is taken for a prompt
        that is too long: then the error is raised, and no turn is lost.
        """
        from blipstream_client import Conversation

        turns = self._conversation.turns
        for forgotten in range(len(turns) + 1):
            asked = Conversation(self._conversation.template, turns[forgotten:])
            try:
                return self._session.answer(
                    self._file, self._image, asked.prompt(question), question=question
                ), forgotten
            except RequestRefusedError:
                if forgotten == len(turns):
                    raise
        raise AssertionError("the last attempt answers or raises")


def _read(file: str) -> bytes:
    """The bytes of an image file; every question sends the same ones, whatever becomes of the file."""
    from blipstream_client.images import image_bytes

    if file == STDIN:
        raise InvalidRequestError(
            "the questions of a chat come from standard input, so its image must be a file, not -"
        )
    return image_bytes(Path(file).expanduser())


def _lines() -> Iterator[str]:
    """The lines of standard input that hold something, after a prompt if a person types them."""
    typed = sys.stdin.isatty() and sys.stdout.isatty()
    if typed:
        with suppress(ImportError):
            import readline  # noqa: F401  # lets `input` edit the line and recall earlier ones
    while True:
        try:
            line = input("> " if typed else "").strip()
        except EOFError:
            if typed:
                print()  # Ctrl-D leaves the cursor behind the prompt
            return
        except KeyboardInterrupt:  # may come just after the answer that it was meant for
            if not typed:
                raise
            print()
            continue
        if line:
            yield line
