"""Peers at full size: their processes, the rounds, the requests, what agrees."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks.compare import environments, measure
from benchmarks.compare.__main__ import main
from benchmarks.compare.measure import Rounds
from benchmarks.compare.process import Peer, PeerError
from benchmarks.compare.systems import SYSTEMS
from benchmarks.compare.tasks import Task, make_tasks, tokens_of
from benchmarks.likeness import likeness

ECHO = [sys.executable, "-m", "tests.benchmarks.compare.echo"]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "peer.log"


@pytest.fixture
def peer(log: Path) -> Iterator[Peer]:
    with Peer(ECHO, log, threads=1) as peer:
        yield peer


def test_a_peer_answers_whatever_its_libraries_print(peer: Peer, log: Path, tmp_path: Path) -> None:
    assert peer.versions == {"numpy": np.__version__}
    assert peer.ask({"task": "echo", "requests": [{"number": 3}, {"number": 4}]}) == {"tokens": [[3], [4]]}
    assert peer.ask({"task": "array", "output": str(tmp_path / "array.npy")}) == {}
    assert np.load(tmp_path / "array.npy").tolist() == [0, 1, 2]
    assert (10 << 20) < peer.memory_bytes() < (2 << 30)
    assert log.read_text().count("clutter of a library") == 2


def test_a_peer_that_fails_says_why_and_goes_on(peer: Peer, log: Path) -> None:
    with pytest.raises(PeerError, match="ValueError: no such thing"):
        peer.ask({"task": "fail"})
    assert "Traceback" in log.read_text()
    assert peer.ask({"task": "echo", "requests": [{"number": 1}]}) == {"tokens": [[1]]}


def test_a_peer_that_dies_is_told(peer: Peer, log: Path) -> None:
    for _ in range(2):
        with pytest.raises(PeerError, match=f"ended with status 7; see {log}"):
            peer.ask({"task": "die"})


def test_a_peer_that_does_not_start_is_told(log: Path) -> None:
    with pytest.raises(PeerError, match="ended with status 1"), Peer([*ECHO, "--broken"], log, threads=1):
        pass
    assert "cannot be loaded" in log.read_text()


def test_a_peer_that_says_something_else_is_told(log: Path) -> None:
    with (
        pytest.raises(PeerError, match=f"it said 'INFO: loading', which is no answer; see {log}"),
        Peer([sys.executable, "-c", "print('INFO: loading')"], log, threads=1),
    ):
        pass


def test_nothing_of_a_peer_is_left(log: Path) -> None:
    child = (
        "import subprocess, sys; subprocess.Popen(['sleep', '600']); print('{\"versions\": {}}', flush=True); input()"
    )
    with Peer([sys.executable, "-c", child], log, threads=1) as peer:
        (sleeper,) = psutil.Process(peer._process.pid).children()
    sleeper.wait(30)  # raises when it goes on; who takes over an orphan may leave it a zombie for a moment


class Fake:
    """Answers with the lengths that are asked for."""

    def __init__(self, short: int = 0) -> None:
        self.jobs: list[list[Any]] = []
        self._short = short

    def ask(self, job: Mapping[str, Any]) -> Mapping[str, Any]:
        self.jobs.append(job["requests"])
        return {"tokens": [[1] * (request["tokens"] - self._short) for request in job["requests"]]}


TASK = Task("answers", 5, lambda number, count, _: [{"id": (number, i), "tokens": 10 + i} for i in range(count)])


def test_rounds_ask_both_sides_the_same_in_turn(tmp_path: Path) -> None:
    peer, ours, said = Fake(), Fake(), []
    pair = Rounds(TASK, first=100, folder=tmp_path, batch=2, on_round=said.append).run(peer, ours, count=2)
    assert said == [0, 1, 2]
    assert [len(job) for job in peer.jobs] == [2, *[2, 2, 1] * 2], "one batch to warm up"
    assert [len(job) for job in ours.jobs] == [5] * 3
    asked = [request["id"] for job in peer.jobs for request in job]
    assert asked[2:] == [request["id"] for job in ours.jobs[1:] for request in job]
    assert asked[:2] == [(100 + measure.WARM_UP, i) for i in range(2)]
    assert asked[2:] == [(number, i) for number in (100, 101) for i in range(5)]
    assert all(request["tokens"] == 3 for request in ours.jobs[0]), "the warm-up is short"
    assert len(pair.ratios) == 2
    assert pair.ratios[0] == pair.peer.seconds[0] / pair.ours.seconds[0]
    assert [len(ids) for ids in pair.peer.outputs[1]] == [10, 11, 12, 13, 14]


def test_each_side_may_be_asked_alone(tmp_path: Path) -> None:
    together, alone = Fake(), Fake()
    rounds = Rounds(TASK, first=0, folder=tmp_path, batch=2, on_round=lambda _: None)
    pair = rounds.run(together, Fake(), count=2)
    side = rounds.alone(alone, rounds.batch, count=2)
    assert alone.jobs == together.jobs
    assert side.outputs == pair.peer.outputs


def test_answers_of_another_length_are_not_compared(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="answers must have"):
        Rounds(TASK, 0, tmp_path, 0, lambda _: None).run(Fake(), Fake(short=1), 1)


def test_likeness() -> None:
    assert likeness([[[1, 2, 3, 4]], [[5, 6]]], [[[1, 2, 9, 4]], [[5, 6]]]) == 4 / 6
    arrays = [np.array([[1.0, 0.0]]), np.array([[1.0, 1.0]])]
    assert likeness(arrays, arrays) == pytest.approx(1)
    assert likeness(arrays, arrays[::-1]) == pytest.approx(0.5**0.5)


@pytest.mark.parametrize("name", make_tasks(4, 28))
def test_requests_are_the_same_each_time_and_others_in_each_round(name: str, tmp_path: Path) -> None:
    task = make_tasks(4, 28)[name]
    first, again, other = (task.requests(number, tmp_path) for number in (1, 1, 2))
    assert len(first) == task.count
    assert first == again != other
    files = [request.get("image", request.get("pixels")) for request in first]
    assert len(set(files)) == (1 if name == "vqa" or name.startswith("language") else task.count)
    assert (tokens_of(first) > 0) == name.startswith(("caption", "answers", "vqa", "language"))


def test_questions_are_as_long_as_real_ones(tmp_path: Path) -> None:
    questions = make_tasks(200, 28)["vqa"].requests(0, tmp_path)
    lengths = [len(question["prompt"].encode()) for question in questions]
    assert 12 < sum(lengths) / len(lengths) < 14, "11 and the two around them"
    assert len(set(lengths)) > 5
    assert all(question["prompt"].isprintable() for question in questions)
    assert 18 < tokens_of(questions) / len(questions) < 22


def test_every_system_has_its_program_and_tasks() -> None:
    tasks = make_tasks(1, 28)
    for system in SYSTEMS.values():
        assert system.environment in {*environments.REQUIREMENTS, environments.PROJECT}
        assert {task.partition(":")[0] for task in system.tasks} <= set(tasks)
        assert Path(measure.__file__).with_name("programs").joinpath(f"{system.program}.py").is_file()


def test_environments_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[list[str]] = []
    monkeypatch.setattr(environments.venv, "create", lambda folder, **_: folder.mkdir(parents=True, exist_ok=True))
    monkeypatch.setattr(environments.subprocess, "run", lambda command, **_: installed.append(command))
    for _ in range(2):
        assert environments.python("openvino", tmp_path) == tmp_path / "environments/openvino/bin/python"
    assert [command[-1] for command in installed] == [environments.REQUIREMENTS["openvino"][i] for i in (0, -1)]
    monkeypatch.setitem(environments.REQUIREMENTS, "openvino", ("torch==0",))
    environments.python("openvino", tmp_path)
    assert len(installed) == 4
    assert environments.python(environments.PROJECT, tmp_path) == Path(sys.executable)


def test_an_environment_that_could_not_be_installed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[str], check: bool) -> None:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(environments.venv, "create", lambda folder, **_: folder.mkdir(parents=True, exist_ok=True))
    monkeypatch.setattr(environments.subprocess, "run", fail)
    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError):
            environments.python("openvino", tmp_path)


@pytest.mark.parametrize("option", ["--systems", "--tasks"])
def test_unknown_names_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["checkpoint", "bundle", option, "nothing"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
