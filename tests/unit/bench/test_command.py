"""``blipstream bench`` against a server in this process."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import Result
from typer.testing import CliRunner

from blipstream.bench import meter
from blipstream.cli import app
from tests.unit.bench.conftest import Endpoint


@pytest.fixture(autouse=True)
def _published_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "_PUBLISHED_S", 0.0)


def bench(endpoint: Endpoint, *arguments: str, model: str = "words", columns: int = 80) -> Result:
    target = ("--protocol", "openai", "--url", endpoint.url, "--model", model)
    workload = ("--requests", "10", "--warmup", "2", "--image-size", "16x16", "--output-tokens", "3")
    return CliRunner().invoke(app, ["bench", *target, *workload, *arguments], env={"COLUMNS": str(columns)})


@pytest.mark.parametrize(
    ("model", "options", "status", "completed", "failed", "said"),
    [
        ("words", ("--request-rate", "500"), 0, 10, 0, "500 a second"),
        ("short", (), 0, 10, 0, "10 of 10 answers have fewer tokens than were asked for"),
        ("unknown", (), 1, 0, 10, "10 failed: .* answered 404"),
        ("mortal", (), 1, 4, 6, "6 failed: .* cannot be asked"),
        ("mortal", ("--metrics-url",), 1, 4, 6, "ended early, and what follows .* no metrics of a Blipstream server"),
        ("interrupting", ("--concurrency", "1"), 130, 4, 0, "interrupted: what follows is what was measured"),
        ("words", ("--concurrency", "16"), 0, 10, 0, "10 requests cannot keep 16 clients busy"),
    ],
)
def test_whatever_ends_a_run_what_was_measured_is_shown_and_written(
    model: str,
    options: tuple[str, ...],
    status: int,
    completed: int,
    failed: int,
    said: str,
    endpoint: Endpoint,
    tmp_path: Path,
) -> None:
    files = ("--json", str(tmp_path / "runs.json"), "--csv", str(tmp_path / "runs.csv"))
    metrics = (f"{endpoint.url}/metrics",) if options == ("--metrics-url",) else ()
    done = bench(endpoint, *options, *metrics, *files, model=model)
    assert done.exit_code == status, done.output
    assert re.search(said, " ".join(done.output.split()))
    (run,) = json.loads((tmp_path / "runs.json").read_text())["runs"]
    assert run["completed"] - completed in (0, 1 if status == 130 else 0)  # one may end while Ctrl-C is handled
    assert run["failed"] == failed
    assert re.search(rf"(client|clients|second) +{run['completed']} +{failed} ", done.stdout)
    with (tmp_path / "runs.csv").open() as file:
        assert [row["completed"] for row in csv.DictReader(file)] == [str(run["completed"])]


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("--json", "{folder}"), "cannot be written: Is a directory"),
        (("--json", "{folder}/none/x.json"), "cannot be written: No such file"),
        (("--csv", "{folder}"), "cannot be written: Is a directory"),
        (("--csv", "{folder}/other.csv"), "has other columns than the rows of this run, differing in .*speed"),
        (("--csv", "{folder}/binary.csv"), "has other columns"),
        (("--csv", "{folder}/x.csv", "--json", "{folder}/x.csv"), "must be a file of its own"),
        (("--csv", "-", "--json", "-"), "must be a file of its own"),
        (("--plot", "{folder}/x.foo"), "a plot's name must end in .png, .*x.foo"),
        (("--plot", "{folder}/x"), "a plot's name must end in"),
        (("--plot", "{folder}/none/x.png"), "cannot be written: No such file"),
        (("--protocol", "carrier-pigeon"), "must be kserve or openai"),
        (("--protocol", "kserve"), "must be HOST:PORT"),
        (("--protocol", "kserve", "--url", "127.0.0.1:1"), "127.0.0.1:1"),
        (("--concurrency", "1", "--request-rate", "1"), "not both"),
        (("--request-rate", "1e9"), "must be 0.001 to 1000000 a second"),
        (("--goodput", "speed:1"), "NAME:MILLISECONDS"),
        (("--goodput", "ttft:1", "--goodput", "ttft:2"), "one limit of ttft"),
        (("--timeout", "nan"), "a timeout must be above 0"),
        (("--timeout", "1e9"), "a timeout must be above 0"),
        (("--metrics-url", "http://127.0.0.1:1/metrics"), "cannot be read"),
        (("--metrics-url", "localhost"), "cannot be read"),
        (("--metrics-url", "{url}/other"), "no metrics of a Blipstream server"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence_before_the_run(
    arguments: tuple[str, ...], fault: str, endpoint: Endpoint, tmp_path: Path
) -> None:
    (tmp_path / "other.csv").write_text("date,speed\n")
    (tmp_path / "binary.csv").write_bytes(b"\xff\0\n")
    before = sorted(tmp_path.iterdir())
    done = bench(endpoint, *(text.format(folder=tmp_path, url=endpoint.url) for text in arguments))
    assert (done.exit_code, done.stdout) == (1, "")
    assert re.fullmatch(f"blipstream bench: [^\n]*{fault}[^\n]*\n", done.stderr), done.stderr
    assert not endpoint.bodies
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("lacking", ["matplotlib", "space"])
def test_what_a_machine_lacks_is_said_before_the_run(
    lacking: str, endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lacking == "space":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5))
    else:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = bench(endpoint, "--plot", str(tmp_path / "x.png"))
    assert done.exit_code == 1
    assert {"matplotlib": "matplotlib is not installed", "space": "it has 5 bytes"}[lacking] in done.stderr
    assert not endpoint.bodies
    assert not list(tmp_path.iterdir())


def test_an_output_that_fails_in_the_end_takes_no_other_with_it(endpoint: Endpoint, tmp_path: Path) -> None:
    (tmp_path / "runs.csv").touch()
    done = bench(endpoint, "--json", "/dev/full", "--csv", str(tmp_path / "runs.csv"))
    assert (done.exit_code, done.stderr) == (
        1,
        "blipstream bench: /dev/full cannot be written: No space left on device\n",
    )
    assert "1 client" in done.stdout
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize("option", ["--json", "--csv"])
def test_standard_output_holds_nothing_but_the_figures(option: str, endpoint: Endpoint) -> None:
    done = bench(endpoint, option, "-")
    rows = json.loads(done.stdout)["runs"] if option == "--json" else list(csv.DictReader(done.stdout.splitlines()))
    assert [int(row["completed"]) for row in rows] == [10]
    assert "requests/s" in done.stderr


@pytest.mark.parametrize("columns", [40, 80])
def test_what_is_shown_fits_80_columns_and_has_the_server_s_side(columns: int, endpoint: Endpoint) -> None:
    options = ("--concurrency", "1", "--concurrency", "1024", "--goodput", "ttft:1000")
    done = bench(endpoint, *options, "--metrics-url", f"{endpoint.url}/metrics", columns=columns)
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert re.search(r"1024 clients +10 +0 +[\d.]+ +[\d.]+ +[\d.]+ *\n", done.stdout)
    assert "1024 clients: the server counted requests 12" not in done.stdout, "the warm-up is not in it"
    assert "1024 clients: the server counted requests 10" in done.stdout
