"""``blipstream caption``, ``ask`` and ``chat`` against the server; in processes of their own for signals."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from blipstream.cli import app
from blipstream.triton.server import TritonServer
from tests.server.conftest import ROW_TOKENS
from tests.server.wire import PATIENCE_S, ask, metric, wait_until

pytestmark = pytest.mark.server

# A shell that runs tests in the background has them ignore SIGINT, and processes inherit that.
MAIN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from blipstream.cli import app; app()"
ENDLESS = ("--min-tokens", "3900", "--max-tokens", "3900")
TEMPLATE = "Question: {} Answer:"


class Cli:
    """Starts the command line with the server's address in its environment."""

    def __init__(self, server: TritonServer) -> None:
        self._environment = {**os.environ, "BLIPSTREAM_URL": server.grpc_url, "PYTHONUNBUFFERED": "1"}

    def run(self, *arguments: str | Path, stdin: bytes = b"") -> Result:
        """Run a command in this process."""
        environment = {"BLIPSTREAM_URL": self._environment["BLIPSTREAM_URL"]}
        return CliRunner().invoke(app, [*map(str, arguments)], stdin, environment, catch_exceptions=False)

    @contextmanager
    def start(self, *arguments: str | Path) -> Iterator[subprocess.Popen[bytes]]:
        command = [sys.executable, "-c", MAIN, *map(str, arguments)]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=self._environment) as process:
            try:
                yield process
            finally:
                process.kill()


@pytest.fixture
def cli(server: TritonServer) -> Cli:
    return Cli(server)


@pytest.fixture
def files(images: list[bytes], tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"image {number}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(image)
    return paths


@pytest.fixture
def texts(server: TritonServer, images: list[bytes]) -> list[str]:
    """What the server says of each image to a plain client."""
    return [words(ask(server.grpc_url, image=image).text) for image in images]


def words(text: str) -> str:
    """A text without the white space that a terminal need not show."""
    return " ".join(text.split())


def objects(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def idle(server: TritonServer) -> bool:
    return metric(server, "blipstream_running_sequences") == 0


def test_caption(cli: Cli, files: list[Path], texts: list[str]) -> None:
    done = cli.run("caption", files[0])
    assert (words(done.stdout), done.stderr, done.exit_code) == (texts[0], "", 0)


def test_caption_reads_standard_input(cli: Cli, images: list[bytes], texts: list[str]) -> None:
    assert words(cli.run("caption", "-", stdin=images[1]).stdout) == texts[1]


def test_captions_come_in_the_order_given(cli: Cli, files: list[Path], texts: list[str]) -> None:
    """More files than slots, and one of them twice."""
    given = [*reversed(files), files[0]]
    done = cli.run("caption", "--json", *given)
    lines = objects(done.stdout)
    assert [line["file"] for line in lines] == [str(file) for file in given]
    assert [words(line["text"]) for line in lines] == [*reversed(texts), texts[0]]
    assert done.exit_code == 0


def test_captions_name_their_files(cli: Cli, files: list[Path], texts: list[str]) -> None:
    out = cli.run("caption", *files[:3]).stdout
    expected = [f"{file}: {text}" for file, text in zip(files[:3], texts, strict=False)]
    assert words(out) == words(" ".join(expected))


def test_json_holds_what_the_server_answers(cli: Cli, server: TritonServer, files: list[Path], image: bytes) -> None:
    (line,) = objects(cli.run("caption", "--json", "--prompt", "a", "--max-tokens", "3", files[0]).stdout)
    reply = ask(server.grpc_url, image=image, text_input="a", max_tokens=3)
    assert words(line["text"]) == words(reply.text)
    assert line["finish_reason"] == reply.finish_reason
    assert line["num_input_tokens"] == reply.num_input_tokens
    assert line["num_output_tokens"] == reply.num_output_tokens
    assert line["seconds"] > 0


def test_bad_files_are_named_and_the_others_go_on(cli: Cli, files: list[Path], texts: list[str]) -> None:
    text, empty, missing = (files[0].with_name(name) for name in ("text.png", "empty.png", "missing.png"))
    text.write_text("not an image")
    empty.touch()
    given = [text, files[0], empty, missing, files[1]]

    done = cli.run("caption", *given)
    assert words(done.stdout) == words(f"{files[0]}: {texts[0]} {files[1]}: {texts[1]}")
    complaints = done.stderr.splitlines()
    for complaint, file in zip(complaints, (text, empty, missing), strict=True):
        assert str(file) in complaint
    assert done.exit_code == 1

    done = cli.run("caption", "--json", *given)
    lines = objects(done.stdout)
    assert [line["file"] for line in lines] == [str(file) for file in given]
    assert ["error" in line for line in lines] == [True, False, True, True, False]
    assert ["text" in line for line in lines] == [False, True, False, False, True]
    assert done.exit_code == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [("--temperature", "nan"), ("--temperature", "-1"), ("--max-tokens", "0"), ("--top-p", "2"), ("--top-k", "-1")],
)
def test_options_out_of_range(cli: Cli, files: list[Path], option: str, value: str) -> None:
    done = cli.run("caption", option, value, files[0])
    assert option.removeprefix("--").replace("-", "_") in done.stderr
    assert (done.stdout, done.exit_code) == ("", 1)


def test_options_reach_the_server(cli: Cli, server: TritonServer, files: list[Path], image: bytes) -> None:
    """Among them those whose value is 0, which is not the same as none."""
    sampled = ("--temperature", "1.5", "--top-k", "0", "--top-p", "0.9", "--repetition-penalty", "1.3", "--seed", "0")
    (line,) = objects(
        cli.run("caption", "--json", *sampled, "--min-tokens", "9", "--max-tokens", "12", files[0]).stdout
    )
    inputs = {"temperature": 1.5, "top_k": 0, "top_p": 0.9, "repetition_penalty": 1.3, "random_seed": 0}
    reply = ask(server.grpc_url, image=image, **inputs, min_tokens=9, max_tokens=12)
    assert words(line["text"]) == words(reply.text)
    assert line["num_output_tokens"] == reply.num_output_tokens


def test_stop_may_be_repeated(cli: Cli, files: list[Path], texts: list[str]) -> None:
    letter = next(character for character in texts[0] if character.isascii() and character.isalpha())
    (line,) = objects(cli.run("caption", "--json", "--stop", "not in it", "--stop", letter, files[0]).stdout)
    assert line["finish_reason"] == "stop"
    assert letter not in line["text"]


def test_ask(cli: Cli, server: TritonServer, files: list[Path], image: bytes) -> None:
    for template in (TEMPLATE, "{}"):
        reply = ask(server.grpc_url, image=image, text_input=template.replace("{}", "how many?"))
        done = cli.run("ask", files[0], "how many?", *(() if template == TEMPLATE else ("--template", template)))
        assert (words(done.stdout), done.stderr, done.exit_code) == (words(reply.text), "", 0)


def test_text_streams_and_an_interruption_ends_it(cli: Cli, server: TritonServer, files: list[Path]) -> None:
    with cli.start("caption", *ENDLESS, files[0]) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) != 0
    wait_until(lambda: idle(server))


def test_an_interruption_ends_all_captions(cli: Cli, server: TritonServer, files: list[Path]) -> None:
    with cli.start("caption", *ENDLESS, *files[:2]) as process:
        wait_until(lambda: metric(server, "blipstream_running_sequences") == 2)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) != 0
    wait_until(lambda: idle(server))


def test_timeout(cli: Cli, server: TritonServer, files: list[Path]) -> None:
    done = cli.run("caption", "--json", "--timeout", "0.5", *ENDLESS, files[0])
    (line,) = objects(done.stdout)
    assert "within 0.5 s" in json.dumps(line["error"])
    assert done.exit_code == 1
    wait_until(lambda: idle(server))


def test_chat_chains_its_turns(cli: Cli, server: TritonServer, files: list[Path], images: list[bytes]) -> None:
    """Each answer is the one to the whole conversation, until /reset or another image."""
    lines = ("what?", "who?", "/reset", "who?", f"/image {files[1]}", "", "who?", "/quit", "never asked")
    done = cli.run("chat", "--json", "--max-tokens", "5", files[0], stdin="\n".join(lines).encode())

    def reply(image: bytes, prompt: str) -> str:
        return ask(server.grpc_url, image=image, text_input=prompt, max_tokens=5).text.strip()

    what, who = TEMPLATE.replace("{}", "what?"), TEMPLATE.replace("{}", "who?")
    first = reply(images[0], what)
    closed = first if first.endswith((".", "!", "?")) else f"{first}."
    expected = [first, reply(images[0], f"{what} {closed} {who}"), reply(images[0], who), reply(images[1], who)]
    answers = objects(done.stdout)
    assert [answer["text"].strip() for answer in answers] == expected
    assert [answer["file"] for answer in answers] == [str(files[0])] * 3 + [str(files[1])]
    assert done.exit_code == 0


def test_chat_drops_the_oldest_turns(cli: Cli, files: list[Path]) -> None:
    """Five questions of which two fit: each is answered, and the user is told what was forgotten."""
    question = "a " * (ROW_TOKENS * 2 // 5)
    done = cli.run("chat", "--json", "--max-tokens", "2", files[0], stdin=f"{question}\n".encode() * 5)
    counts = [answer["num_input_tokens"] for answer in objects(done.stdout)]
    assert len(counts) == 5
    assert counts[0] < counts[1]
    assert any(later <= earlier for earlier, later in itertools.pairwise(counts)), counts
    assert counts[-1] > counts[0]
    assert "too long for the model" in done.stderr
    assert done.exit_code == 0


def test_chat_refuses_a_question_that_is_too_long_alone(cli: Cli, files: list[Path]) -> None:
    lines = f"what?\n{'a ' * ROW_TOKENS}\nwhat?\n"
    done = cli.run("chat", "--json", "--max-tokens", "2", files[0], stdin=lines.encode())
    first, refused, second = objects(done.stdout)
    assert "leave room for an answer" in json.dumps(refused["error"])
    assert second["num_input_tokens"] > first["num_input_tokens"], "the turn before was forgotten"
    assert done.exit_code == 1


def test_chat_goes_on_after_bad_lines(cli: Cli, files: list[Path]) -> None:
    lines = "/image missing.png\n/nonsense\n/help\nwhat?\n"
    done = cli.run("chat", "--max-tokens", "5", "--min-tokens", "5", files[0], stdin=lines.encode())
    for said in ("missing.png", "/nonsense", "/reset"):
        assert said in done.stderr
    assert len(done.stdout.splitlines()) >= 1
    assert done.stdout.strip()


def test_chat_needs_an_image_file(cli: Cli, tmp_path: Path) -> None:
    done = cli.run("chat", tmp_path / "missing.png")
    assert "missing.png" in done.stderr
    assert (done.stdout, done.exit_code) == ("", 1)


def test_an_interruption_cancels_one_answer(cli: Cli, server: TritonServer, files: list[Path]) -> None:
    with cli.start("chat", *ENDLESS, files[0]) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for question in (b"what?\n", b"who?\n"):
            process.stdin.write(question)
            process.stdin.flush()
            wait_until(lambda: metric(server, "blipstream_running_sequences") == 1)
            assert process.stdout.read(1)
            process.send_signal(signal.SIGINT)
            wait_until(lambda: idle(server))
        _out, err = process.communicate(b"/quit\n", timeout=PATIENCE_S)
    assert err.count(b"cancelled") == 2
    assert process.returncode == 0
