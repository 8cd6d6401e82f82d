"""caption, ask and chat against a server in this process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from blipstream.cli import app
from tests.unit.client.fake_server import PATIENCE_S, FakeServer


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = FakeServer()
    yield server.url
    server.close()


@pytest.fixture
def image(tmp_path: Path) -> str:
    file = tmp_path / "日本.png"
    file.write_bytes(b"an image file")
    return str(file)


def run(url: str, *arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(app, [*arguments], input=stdin, env={"BLIPSTREAM_URL": url})


@pytest.mark.parametrize(
    ("arguments", "stdin", "status", "said"),
    [
        (("caption",), "", 0, "a red circle\n"),
        (("caption", "--json"), "", 0, '"text": "a red circle"'),
        (("ask", "what?"), "", 0, "a red circle\n"),
        (("ask", ""), "", 0, "a red circle\n"),
        (("ask", "“Is it 'red'?” 🙂 " * 500), "", 0, "a red circle\n"),
        (("ask", "what?", "--template", "Q:"), "", 1, "'Q:'"),
        (("chat",), "what?\n", 0, "a red circle\n"),
        (("chat",), "/image\nwhat?\n", 1, "/image needs the file to talk about: /image FILE"),
        (("chat",), "/imag x\n", 1, "one of the commands of /help, but it is '/imag x'"),
        (("caption", "--url", "localhost"), "", 1, "'localhost', which has no port"),
        (("caption", "--url", "localhost:99999"), "", 1, "whose port is not from 1 to 65535"),
        (("caption", "--url", "localhost:1"), "", 1, "nothing listens there; `blipstream serve BUNDLE`"),
        (("caption", "--url", "unix:/nowhere"), "", 1, "unix:/nowhere is unavailable"),
        (("caption", "--timeout", "0"), "", 1, "timeout must be a finite number of seconds above 0"),
        (("caption", "--max-tokens", "abc"), "", 2, "--max-tokens"),
        (("caption", "--max-token", "3"), "", 2, "--max-tokens"),
        (("caption", "-h"), "", 0, "Usage"),
    ],
)
def test_what_the_commands_say(
    url: str, image: str, arguments: tuple[str, ...], stdin: str, status: int, said: str
) -> None:
    command, *rest = arguments
    done = run(url, command, image, *rest, stdin=stdin)
    assert said in done.output
    assert done.exit_code == status


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "line\nbreak"])
def test_a_bad_file_is_named_and_the_next_one_captioned(url: str, image: str, tmp_path: Path, kind: str) -> None:
    bad = tmp_path / kind
    if kind == "folder":
        bad.mkdir()
    elif kind == "empty":
        bad.touch()
    done = run(url, "caption", str(bad), image)
    assert kind.partition("\n")[0] in done.stderr
    assert done.stdout == f"{image}: a red circle\n"
    assert done.exit_code == 1


@pytest.mark.parametrize(
    ("output", "encoding", "status", "said"),
    [
        ("pipe", "latin-1", 0, b"\\u65e5\\u672c.png: a red circle\n"),
        ("pipe", "utf-8", 0, "日本.png: a red circle\n".encode()),
        ("/dev/full", "utf-8", 1, b"the answer cannot be written: No space left on device\n"),
    ],
)
def test_output_of_a_process(url: str, image: str, output: str, encoding: str, status: int, said: bytes) -> None:
    command = [sys.executable, "-m", "blipstream", "caption", "--url", url, image, image]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    with Path("/dev/full" if output == "/dev/full" else "/dev/null").open("wb") as file:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE if output == "pipe" else file,
            stderr=subprocess.PIPE,
            env=environment,
            timeout=PATIENCE_S,
            check=False,
        )
    assert said in (done.stdout or done.stderr)
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    assert done.returncode == status
