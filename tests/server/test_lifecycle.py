"""Starting and stopping: what the user reads, and that nothing is left behind, however it ends."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from blipstream_client import AsyncClient
from tritonclient.utils import InferenceServerException

import blipstream.bundle
from blipstream.config import ServerConfig
from blipstream.errors import ServerStartError, ServerUnavailableError
from blipstream.triton.installation import Installation
from blipstream.triton.server import TritonServer
from tests.server.wire import PATIENCE_S, Stream, ask, wait_until

pytestmark = [pytest.mark.server, pytest.mark.slow]

SHM = Path("/dev/shm")
HOSTILE = "-a b'\"$(touch PWNED)`touch PWNED`;touch PWNED;&*?[x]{a,b}~!#%=,:\\ \u00fc\u65e5\udcff"
"""A file name with all that shells, lists of paths and encodings trip over."""
NICENESS = 3


class Served:
    """``blipstream serve`` in a process of its own, whose descendants are known by a variable."""

    def __init__(self, bundle: Path, folder: Path, temporary: Path, *options: str) -> None:
        self.folder = temporary
        self.log = folder / f"{HOSTILE}.log"
        command = [str(Path(sys.executable).parent / "blipstream"), "serve", str(bundle), "--threads", "1"]
        ports = [option for name in ("grpc", "http", "metrics") for option in (f"--{name}-port", "0")]
        self.process = subprocess.Popen(
            [*command, *ports, "--log-file", str(self.log), *options],
            env={**os.environ, "TMPDIR": str(self.folder), "SERVED": str(self.folder), "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []

    def wait_until_ready(self) -> str:
        """``host:port`` of gRPC, as the command printed it."""
        assert self.process.stdout is not None
        while not (self.lines and "Ctrl-C" in self.lines[-1]):
            line = self.process.stdout.readline()
            assert line, self.process.stderr.read() if self.process.stderr else ""
            self.lines.append(line.rstrip("\n"))
        match = re.search(r"gRPC +(\S+)", "\n".join(self.lines))
        assert match
        return match[1]

    def finish(self) -> tuple[int, str]:
        """Exit status and standard error."""
        _, errors = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, errors

    def descendants(self) -> list[int]:
        """Processes, zombies excepted, that have inherited the variable."""
        wanted = f"SERVED={self.folder}".encode()
        return [pid for pid in all_pids() if pid != os.getpid() and wanted in environment(pid).split(b"\0")]

    def server(self) -> int:
        """The process of ``tritonserver``."""
        (pid,) = (pid for pid in self.descendants() if executable(pid) == "tritonserver")
        return pid

    def regions(self) -> list[Path]:
        return list(SHM.glob(f"blipstream_{self.process.pid}_*"))

    def check_it_runs(self) -> None:
        processes = {pid: executable(pid) for pid in self.descendants()}
        models = [pid for pid, name in processes.items() if name == "triton_python_backend_stub"]
        own = os.getpriority(os.PRIO_PROCESS, 0)
        niceness = sorted(os.getpriority(os.PRIO_PROCESS, pid) - own for pid in models)
        assert niceness == [0, 0, 0, 0, NICENESS], "of all models, blip2 alone is told to be nice"
        assert list(processes.values()).count("tritonserver") == 1
        assert self.regions()
        assert list(self.folder.iterdir())

    def check_nothing_is_left(self) -> None:
        wait_until(lambda: not self.descendants())
        wait_until(lambda: not self.regions())
        wait_until(lambda: not list(self.folder.iterdir()))

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(PATIENCE_S)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


def all_pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it has ended, or is a zombie
        return b""


def executable(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/exe").readlink().name
    except OSError:
        return ""


@pytest.fixture
def hostile(bundle: Path, tmp_path: Path) -> Path:
    """A copy whose path and name are hostile."""
    return Path(shutil.copytree(bundle, tmp_path / HOSTILE / HOSTILE))


@pytest.fixture
def served(hostile: Path, tmp_path: Path) -> Iterator[Served]:
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary:  # of short name, so it is not passed over
        served = Served(hostile, tmp_path, Path(temporary), "--stop-grace", "0.5", "--decode-niceness", str(NICENESS))
        yield served
        served.close()


def test_a_stop_answers_who_waits_and_leaves_nothing(served: Served, image: bytes) -> None:
    url = served.wait_until_ready()
    assert [line.split()[0] for line in served.lines] == ["Loading", "Serving", "gRPC", "HTTP", "metrics", "Ctrl-C"]
    served.check_it_runs()
    assert ask(url, image=image, max_tokens=3).num_output_tokens == 3
    with Stream(url, image=image, max_tokens=100_000, min_tokens=100_000, stream=True, temperature=1.0) as stream:
        stream.next()
        served.process.send_signal(signal.SIGINT)
        with pytest.raises(InferenceServerException, match="the server is shutting down"):
            stream.rest()
    status, errors = served.finish()
    assert (status, errors) == (0, "")
    served.check_nothing_is_left()
    assert "Started GRPCInferenceService" in served.log.read_text()


def test_a_killed_launcher_leaves_nothing(served: Served) -> None:
    served.wait_until_ready()
    served.check_it_runs()
    served.process.kill()
    served.process.wait(PATIENCE_S)
    served.check_nothing_is_left()


def test_a_server_that_dies_is_reported_and_leaves_nothing(served: Served) -> None:
    served.wait_until_ready()
    served.check_it_runs()
    os.kill(served.server(), signal.SIGKILL)
    status, errors = served.finish()
    assert status == 1
    assert errors.strip() == "blipstream serve: tritonserver ended unexpectedly, with status 137"
    served.check_nothing_is_left()


def test_a_stop_while_models_load_leaves_nothing(served: Served) -> None:
    wait_until(lambda: any(executable(pid) == "triton_python_backend_stub" for pid in served.descendants()))
    served.process.terminate()
    status, errors = served.finish()
    assert (status, errors) == (0, "")
    served.check_nothing_is_left()


def test_a_model_that_fails_to_load_is_one_sentence(
    hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = hostile / "blip2" / "1" / "decoder.onnx"
    graph.write_bytes(bytes(graph.stat().st_size))
    monkeypatch.setattr(blipstream.bundle, "ALWAYS_HASHED", 1 << 10)
    log = tmp_path / "server.log"
    regions = set(SHM.glob(f"blipstream_{os.getpid()}_*"))
    server = TritonServer(hostile, log_file=log)
    with pytest.raises(ServerStartError) as caught:
        server.start()
    message = str(caught.value)
    assert message.startswith("tritonserver did not start: model blip2: ONNX Runtime cannot load ")
    assert str(graph) in message
    assert "\n" not in message
    assert "Traceback" not in message
    assert set(SHM.glob(f"blipstream_{os.getpid()}_*")) == regions
    assert b"failed to load 'blip2'" in log.read_bytes()
    server.stop()


@pytest.mark.parametrize(
    ("path", "text", "cause"),
    [
        (
            "models/qformer/1/model.py",
            "import os\n\nos.abort()",
            "(: model qformer: .*|process died: .*)",
        ),
        ("backends/python/triton_python_backend_stub", "#!/bin/sh\necho no >&2\nexit 1", "a model's process died: no"),
    ],
)
def test_a_model_that_dies_at_its_start_is_reported_at_once(
    path: str, text: str, cause: str, hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_backends(installation: Installation, folder: Path) -> None:
        make(installation, folder)
        file = folder.parent / path
        file.unlink()
        file.write_text(text)
        file.chmod(0o755)

    make = Installation.make_backends
    monkeypatch.setattr(Installation, "make_backends", make_backends)
    with pytest.raises(ServerStartError, match=f"^tritonserver did not start.*{cause}$"):
        TritonServer(hostile, start_timeout=50.0).start()


def test_a_log_on_a_full_disk_is_one_sentence(hostile: Path) -> None:
    with pytest.raises(ServerStartError, match=r"^the log file /dev/full cannot be written: No space left on device$"):
        TritonServer(hostile, log_file=Path("/dev/full")).start()


def test_a_server_that_is_not_ready_in_time_is_stopped(hostile: Path, tmp_path: Path) -> None:
    with pytest.raises(ServerStartError, match=r"tritonserver was not ready after 0 s"):
        TritonServer(hostile, log_file=tmp_path / "log", start_timeout=0.0).start()


def test_two_servers_at_once(server: TritonServer, bundle: Path, image: bytes, tmp_path: Path) -> None:
    """A second server disturbs the first neither while it runs nor when it stops."""
    expected = ask(server.grpc_url, image=image, max_tokens=5).token_ids
    with TritonServer(bundle, log_file=tmp_path / "log") as other:
        assert other.grpc_url != server.grpc_url
        assert ask(other.grpc_url, image=image, max_tokens=5).token_ids == expected
    assert ask(server.grpc_url, image=image, max_tokens=5).token_ids == expected


async def test_refused_requests_do_not_hold_up_a_stop(bundle: Path, image: bytes) -> None:
    """A client that cancels a call whose last response it has may leave Triton unable to unload the model.

    With its verbose log Triton is slow enough that this comes about every time.
    """
    with TritonServer(bundle, config=ServerConfig(threads=1, queue_size=24), verbose=True) as server:
        async with AsyncClient(server.grpc_url) as client:
            calls = [client.generate(image, max_tokens=300, min_tokens=300) for _ in range(60)]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert any(isinstance(outcome, ServerUnavailableError) for outcome in outcomes)
    assert not [line for line in server.log_tail if "Exit timeout expired" in line]
