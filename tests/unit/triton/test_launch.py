"""What surrounds a server: its settings, its files, its ports, its log, its guard. No server is started."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from blipstream.config import ServerConfig
from blipstream.errors import ServerStartError
from blipstream.triton import guard, installation
from blipstream.triton.installation import Installation
from blipstream.triton.log import LogPump, find_cause, is_alarming
from blipstream.triton.server import choose_ports

# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_travel_by_environment() -> None:
    config = ServerConfig(threads=3, queue_size=7, request_timeout=1.5, cache_bytes=0)
    variables = config.to_environment()
    assert variables["BLIPSTREAM_QUEUE_SIZE"] == "7"
    assert ServerConfig.from_environment(variables) == config
    assert ServerConfig.from_environment({}) == ServerConfig()


@pytest.mark.parametrize(
    ("variables", "fault"),
    [
        ({"BLIPSTREAM_THREADS": "two"}, "BLIPSTREAM_THREADS must be an integer, but it is 'two'"),
        ({"BLIPSTREAM_REQUEST_TIMEOUT": "long"}, "BLIPSTREAM_REQUEST_TIMEOUT must be a number, but it is 'long'"),
        ({"BLIPSTREAM_QUEUE_SIZE": "0"}, "queue_size must be at least 1, but it is 0"),
        ({"BLIPSTREAM_REQUEST_TIMEOUT": "nan"}, "request_timeout must be at least 0, but it is nan"),
        ({"BLIPSTREAM_CACHE_BYTES": "-1"}, "cache_bytes must be at least 0, but it is -1"),
    ],
)
def test_wrong_settings_are_named(variables: dict[str, str], fault: str) -> None:
    with pytest.raises(ServerStartError) as caught:
        ServerConfig.from_environment(variables)
    assert str(caught.value) == fault


# --- ports -----------------------------------------------------------------------------------------------------------


def test_free_ports_are_chosen_and_given_ones_kept() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        free = other.getsockname()[1]
    ports = choose_ports({"grpc": 0, "http": free, "metrics": 0})
    assert ports["http"] == free
    assert len(set(ports.values())) == 3
    assert all(1024 <= port < 65536 for port in ports.values())


def test_a_taken_port_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServerStartError) as caught:
            choose_ports({"grpc": 0, "http": port, "metrics": 0})
    assert str(caught.value) == f"port {port} on 127.0.0.1 cannot be used for the http service: it is taken"


@pytest.mark.parametrize(
    ("ports", "fault"),
    [
        ({"grpc": 9, "http": 9, "metrics": 0}, "each service needs a port of its own"),
        ({"grpc": 70000, "http": 0, "metrics": 0}, "port 70000 on 127.0.0.1 cannot be used for the grpc service"),
    ],
)
def test_impossible_ports(ports: dict[str, int], fault: str) -> None:
    with pytest.raises(ServerStartError, match=fault):
        choose_ports(ports)


# --- installation ----------------------------------------------------------------------------------------------------


def test_the_installed_server_is_found(tmp_path: Path) -> None:
    found = Installation.find()
    assert os.access(found.binary, os.X_OK)
    found.make_backends(tmp_path)
    names = {path.name for path in (tmp_path / "python").iterdir()}
    assert names >= {"libtriton_python.so", "triton_python_backend_utils.py", "triton_python_backend_stub"}
    assert all(path.exists() for path in (tmp_path / "python").iterdir())


def test_the_environment_leads_to_this_interpreter_and_bounds_threads() -> None:
    variables = Installation.find().environment(threads=3)
    assert variables["PATH"].startswith(str(Path(sys.executable).parent))
    assert variables["OMP_NUM_THREADS"] == "3"
    assert variables["ORT_DISABLE_TELEMETRY"] == "1"
    package = importlib.util.find_spec("blipstream")
    assert package is not None
    assert package.origin is not None
    assert str(Path(package.origin).parents[1]) in variables["PYTHONPATH"].split(os.pathsep)
    assert "nvidia_pytriton.libs" in variables["LD_LIBRARY_PATH"]


def test_a_missing_server_says_which_extra_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation.importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(ServerStartError, match=r"tritonserver is not installed: `pip install -e '\.\[server\]'`"):
        Installation.find()


def test_a_numpy_that_is_too_new_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation.importlib.metadata, "version", lambda *_: "2.1.0")
    with pytest.raises(ServerStartError, match=r"numpy 2\.1\.0 is installed, and .* older than 2"):
        Installation.find()


# --- log -------------------------------------------------------------------------------------------------------------

STAMP = "1124 00:03:37.808042 8555"
TABLE = "+----------+---------+"
LOAD_FAILED = f"E{STAMP} model_lifecycle.cc:642] \"failed to load '{{}}' version 1: Internal: {{}}\""
LIBRARY = "error while loading shared libraries: libpython3.11.so.1.0: cannot open"
SOCKET = "failed to start GRPC service: Unavailable - Socket '127.0.0.1:9' already in use"


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        (
            [
                f'I{STAMP} pb_stub.cc:366] "Failed to initialize Python stub: EngineError: broken\\n\\nAt:\\n  /x.py"',
                LOAD_FAILED.format(
                    "blip2", "EngineError: ONNX Runtime cannot load /b/x.onnx: no.\\n\\nAt:\\n  /x.py(6)"
                ),
                TABLE,
                "error: creating server: Internal - failed to load all models",
            ],
            "model blip2: ONNX Runtime cannot load /b/x.onnx: no",
        ),
        (
            [LOAD_FAILED.format("qformer", "ModuleNotFoundError: No module named 'a'")],
            "model qformer: ModuleNotFoundError: No module named 'a'",
        ),
        ([f'E{STAMP} main.cc:1] "{SOCKET} "'], SOCKET),
        ([f"/x/triton_python_backend_stub: {LIBRARY}", f'E{STAMP} x.cc:1] "something else"'], LIBRARY),
        ([f'I{STAMP} a.cc:1] "all well"', "Killed", TABLE, ""], "Killed"),
        ([f'E{STAMP} server.cc:241] "CudaDriverHelper has not been initialized."'], "it said nothing"),
        ([], "it said nothing"),
    ],
)
def test_the_cause_of_a_failure_is_found_in_the_log(lines: list[str], cause: str) -> None:
    assert find_cause(lines) == cause


@pytest.mark.parametrize(
    ("line", "alarming"),
    [
        (f'I{STAMP} model_lifecycle.cc:472] "loading: blip2:1"', False),
        (f'W{STAMP} pinned_memory_manager.cc:273] "Unable to allocate pinned system memory"', False),
        ("Error: Failed to initialize NVML", False),
        (TABLE, False),
        ("| Model | Version |", False),
        ("", False),
        (f'E{STAMP} model.cc:1] "failed to load"', True),
        (f'W{STAMP} model.cc:1] "odd"', True),
        ("WARNING blip2: a prefill of 3 prompts failed", True),
        ("Traceback (most recent call last):", True),
    ],
)
def test_only_what_matters_is_shown(line: str, alarming: bool) -> None:
    assert is_alarming(line) is alarming


def test_the_log_is_passed_on_and_its_end_kept() -> None:
    read, write = os.pipe()
    written: list[str] = []
    pump = LogPump(os.fdopen(read, "rb"), written.append, lambda line: "b" in line)
    with os.fdopen(write, "wb") as stream:
        stream.write(b"a\nb\xff\nc")
    pump.join()
    assert written == ["b\N{REPLACEMENT CHARACTER}"]
    assert pump.tail() == ["a", "b\N{REPLACEMENT CHARACTER}", "c"]


# --- guard -----------------------------------------------------------------------------------------------------------


class Guarded:
    """A guard over a shell script in place of the server."""

    def __init__(self, folder: Path, script: str, stop_timeout: float = 30.0) -> None:
        self.folder = folder / "temporary"
        self.folder.mkdir()
        self.notes = folder / "notes"
        self.notes.mkdir()
        self.prefix = f"blipstream_test_{os.getpid()}_{time.monotonic_ns()}_"
        job: dict[str, Any] = {
            "command": ["/bin/bash", "-c", script, "server", str(self.notes), self.prefix],
            "folder": str(self.folder),
            "shm_prefix": self.prefix,
            "lifeline_variable": "LIFELINE",
            "stop_timeout": stop_timeout,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, json.dumps(job)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def note(self, name: str) -> str:
        """What the script wrote into a file of that name, once it has."""
        path = self.notes / name
        wait_until(lambda: path.is_file() and path.read_text().endswith("\n"))
        return path.read_text().strip()

    def close(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(60)

    def check_nothing_is_left(self, *pids: str) -> None:
        assert not self.folder.exists()
        assert not list(guard.SHM.glob(f"{self.prefix}*"))
        for pid in pids:
            wait_until(lambda pid=pid: not is_running(int(pid)))  # type: ignore[misc]


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


CHILD = 'sleep 1000 & echo $! > "$1/child"; touch "/dev/shm/$2region"; echo $$ > "$1/server";'
WAIT = " while :; do sleep 0.02; done"


def test_closing_the_pipe_stops_the_server_and_leaves_nothing(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, f"trap 'echo x > \"$1/asked\"; exit 3' TERM; {CHILD}{WAIT}")
    server, child = guarded.note("server"), guarded.note("child")
    assert guarded.close() == 3
    assert guarded.note("asked") == "x"
    guarded.check_nothing_is_left(server, child)


def test_a_server_that_ends_by_itself_leaves_nothing(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, f"{CHILD} exit 7")
    child = guarded.note("child")
    assert guarded.process.wait(60) == 7
    assert guarded.process.stdin is not None
    guarded.process.stdin.close()
    guarded.check_nothing_is_left(child)


def test_a_server_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, f"trap '' TERM; {CHILD}{WAIT}", stop_timeout=0.2)
    server, child = guarded.note("server"), guarded.note("child")
    assert guarded.close() == 128 + signal.SIGKILL
    guarded.check_nothing_is_left(server, child)


def test_the_lifeline_ends_when_the_server_is_to_stop(tmp_path: Path) -> None:
    """The server here ends only when its lifeline has."""
    stop = 'while ! test -f "$1/ended"; do sleep 0.02; done; echo yes > "$1/stopped"; exit 0'
    guarded = Guarded(tmp_path, f"(cat <&$LIFELINE; echo x > \"$1/ended\") & trap '{stop}' TERM; {CHILD}{WAIT}")
    guarded.note("server")
    assert not (guarded.notes / "ended").exists()
    assert guarded.close() == 0
    assert guarded.note("stopped") == "yes"
    guarded.check_nothing_is_left()


def test_signals_of_the_terminal_are_left_to_the_launcher(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, f"{CHILD}{WAIT}")
    server = guarded.note("server")
    for number in (signal.SIGINT, signal.SIGTERM):
        guarded.process.send_signal(number)
    time.sleep(0.2)
    assert is_running(int(server))
    guarded.close()
    guarded.check_nothing_is_left(server)


def test_the_server_is_told_to_stop_when_the_guard_is_killed(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, f"trap 'echo x > \"$1/asked\"; kill %1; exit' TERM; {CHILD}{WAIT}")
    server = guarded.note("server")
    guarded.process.kill()
    assert guarded.note("asked") == "x"
    guarded.process.wait(60)
    wait_until(lambda: not is_running(int(server)))
    for region in guard.SHM.glob(f"{guarded.prefix}*"):
        region.unlink()
    assert guarded.process.stdin is not None
    guarded.process.stdin.close()


def test_the_launchers_death_of_any_kind_stops_the_server(tmp_path: Path) -> None:
    """A launcher that is killed closes nothing itself; the operating system does."""
    script = f"{CHILD}{WAIT}"
    (tmp_path / "temporary").mkdir()
    job = {
        "command": ["/bin/bash", "-c", script, "server", str(tmp_path), f"blipstream_test_{os.getpid()}_dying_"],
        "folder": str(tmp_path / "temporary"),
        "shm_prefix": f"blipstream_test_{os.getpid()}_dying_",
        "lifeline_variable": "LIFELINE",
        "stop_timeout": 30,
    }
    code = (
        "import subprocess, sys, time\n"
        "subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, start_new_session=True)\n"
        "time.sleep(1000)"
    )
    command = [sys.executable, "-I", "-S", guard.__file__, json.dumps(job)]
    launcher = subprocess.Popen([sys.executable, "-c", code, *command])
    wait_until(lambda: (tmp_path / "server").is_file() and (tmp_path / "server").read_text().endswith("\n"))
    server = int((tmp_path / "server").read_text())
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not is_running(server))
    wait_until(lambda: not (tmp_path / "temporary").exists())
    assert not list(guard.SHM.glob(f"{job['shm_prefix']}*"))
