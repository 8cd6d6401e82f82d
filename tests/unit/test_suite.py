"""The suite's own machinery: servers that die, the store of bundles, the order of modules."""

from __future__ import annotations

import ast
import json
import os
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import order_modules
from tests.support import durations, servers
from tests.support.bundles import BUILDING, KEPT_S, NOT_BUILT, ROOT, contents, stored
from tests.support.servers import DEATH, ServerDiedError, Serving


class FakeServer:
    """Serves until ``status`` is set; it may ``hang`` as well."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.hangs = self.stopped = False
        self.http_url = "http://127.0.0.1:1"
        self.log_tail = [f"line {number}" for number in range(40)]

    def start(self) -> FakeServer:
        return self

    def poll(self) -> int | None:
        return self.status

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FakeServer]:
    monkeypatch.setattr(servers, "is_ready", lambda server: not server.hangs)
    monkeypatch.setattr(servers, "HEALTH_S", 0.1)
    return []


@pytest.fixture
def serving(made: list[FakeServer]) -> Serving:
    def make() -> Any:
        made.append(FakeServer())
        return made[-1]

    return Serving(make)


def item(name: str) -> Any:
    return SimpleNamespace(nodeid=name, user_properties=[])


@pytest.mark.parametrize(
    ("died", "fault", "is_tritons"),
    [
        ({"status": 139}, "ended with status 139; tritonserver itself crashed (SIGSEGV)", True),
        ({"status": 1, "log_tail": ["Signal (11) received."]}, "ended with status 1; tritonserver itself", True),
        ({"status": 137}, "ended with status 137\n", False),
        ({"status": 0}, "ended with status 0\n", False),
        ({"hangs": True}, "did not answer within 0.1 s that it is ready\n", False),
    ],
)
def test_a_servers_death_is_the_fault_of_its_own_test(
    made: list[FakeServer], serving: Serving, died: dict[str, Any], fault: str, is_tritons: bool
) -> None:
    with serving.lent(item("before")) as first, serving.lent(item("beside")) as same:
        assert same is first
    killing = item("killing")
    with pytest.raises(ServerDiedError) as death, serving.lent(killing):
        vars(made[0]).update(died)
    assert str(death.value).startswith(f"the server {fault}")
    assert death.value.is_tritons == is_tritons
    assert str(death.value).endswith(made[0].log_tail[-1])
    assert killing.user_properties == [(DEATH, str(death.value))]
    assert made[0].stopped
    after = item("after")
    with serving.lent(after) as server:
        assert server is made[1]
    assert after.user_properties == []


def test_a_death_between_two_tests_fails_neither(made: list[FakeServer], serving: Serving) -> None:
    with serving.lent(item("before")):
        pass
    made[0].status = 139
    after = item("after")
    with serving.lent(after) as server:
        assert server is made[1]
    ((name, text),) = after.user_properties
    assert name == DEATH
    assert text.startswith("after before: the server ended with status 139; ")


def test_an_entry_is_made_once_and_never_found_unfinished(tmp_path: Path) -> None:
    calls = []

    def make(folder: Path) -> None:
        calls.append(folder)
        folder.mkdir()
        if len(calls) == 1:
            raise RuntimeError("interrupted")
        (folder / "file").write_text("whole")

    with pytest.raises(RuntimeError, match="interrupted"):
        stored("entry", make, tmp_path)
    for _ in range(2):
        assert (stored("entry", make, tmp_path) / "file").read_text() == "whole"
    assert len(calls) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"entry", "entry.lock"}


def test_what_nobody_uses_is_removed(tmp_path: Path) -> None:
    for name in ("old", "used", "new"):
        stored(name, Path.mkdir, tmp_path)
        if name != "new":
            os.utime(tmp_path / name, (0, time.time() - KEPT_S - 10))
        stored("used", Path.mkdir, tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"used", "new"}


def test_a_key_changes_with_every_byte_and_name(tmp_path: Path) -> None:
    (tmp_path / "a" / "__pycache__").mkdir(parents=True)
    file = tmp_path / "a" / "b"
    digests = []
    for text in ("one", "two", "one"):
        file.write_text(text)
        digests.append(contents([tmp_path]))
    file = file.rename(tmp_path / "a" / "c")
    digests.append(contents([tmp_path]))
    (tmp_path / "a" / "__pycache__" / "d").write_text("compiled")
    digests.append(contents([tmp_path]))
    assert digests[0] == digests[2] != digests[1]
    assert digests[3] == digests[4] not in digests[:3]
    assert contents([tmp_path], [tmp_path / "a"]) == contents([])


def test_no_build_runs_what_its_key_leaves_out() -> None:
    """The command line imports it, and builds nothing by that."""
    left_out = {f"blipstream.{path.name}" for path in NOT_BUILT}
    files = [file for folder in BUILDING for file in folder.rglob("*.py") if not set(NOT_BUILT) & set(file.parents)]
    imported: dict[str, set[str]] = {}
    for file in files:
        if "model_repository" in file.parts or file.name == "cli.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                if any(f"{name}.".startswith(f"{one}.") for one in left_out):
                    imported.setdefault(str(file.relative_to(ROOT)), set()).add(name)
    assert imported == {}


def test_the_slowest_modules_come_first_and_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durations, "load", lambda: {"quick.py": 0, "slow.py": 100, "middling.py": 40})
    items = [item(f"{name}.py::test_{i}") for i in "ba" for name in ("quick", "new", "slow", "middling")]
    order_modules(items)
    expected = [f"{name}.py::test_{i}" for name in ("slow", "middling", "new", "quick") for i in "ba"]
    assert [one.nodeid for one in items] == expected


def test_durations_are_summed_by_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    junit = tmp_path / "junit.xml"
    cases = [("tests.unit.test_suite", 1.5), ("tests.unit.test_suite.TestClass", 2), ("tests.conftest", 0.25)]
    lines = [f'<testcase classname="{name}" name="test" time="{seconds}"/>' for name, seconds in cases]
    junit.write_text(f"<testsuites><testsuite>{''.join(lines)}</testsuite></testsuites>")
    modules = durations.read_modules(junit)
    assert modules == Counter({"tests/unit/test_suite.py": 3.5, "tests/conftest.py": 0.25})
    monkeypatch.setattr(durations, "TABLE", tmp_path / "durations.json")
    durations.record(modules)
    assert json.loads(durations.TABLE.read_text()) == {"tests/unit/test_suite.py": 4, "tests/conftest.py": 0}
