"""Servers that several tests share: whatever one test does to its server, the next test finds a running one.

    @pytest.fixture(scope="module")
    def serving(checkpoint: Path) -> Iterator[Serving]:
        with served(bundle_of(checkpoint)) as serving:
            yield serving

    def test_something(server: TritonServer) -> None: ...

The fixture ``server`` of ``tests/server`` lends the nearest ``serving`` to one test, and has that test fail in whose
time the server died.
"""

from __future__ import annotations

import contextlib
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from blipstream.config import ServerConfig
from blipstream.triton.server import TritonServer

START_S = 120.0
HEALTH_S = 10.0
"""Time in which a server must answer that it is ready."""
DEATH = "server_death"
"""Property of a test in whose time a server died; the summary of the run shows it."""
TAIL_LINES = 20
"""Of the server's log, in a message."""
_TABLES = ("+", "|")
CRASHED = 139
"""Status of a process that ended of SIGSEGV."""
TRITONS_CRASH = (
    "tritonserver itself crashed (SIGSEGV), and no model of ours, which run in processes of their own: release 24.10 "
    "can, when a request is cancelled while it ends"
)


class ServerDiedError(AssertionError):
    """A server ended, or stopped answering, during a test."""

    def __init__(self, message: str, *, is_tritons: bool) -> None:
        super().__init__(message)
        self.is_tritons = is_tritons
        """Whether Triton itself crashed."""


class Serving:
    """One server after the other: a new one whenever the last has died.

    Args:
        make: returns a server that has not started yet.
    """

    def __init__(self, make: Callable[[], TritonServer]) -> None:
        self._make = make
        self._server: TritonServer | None = None
        self._last_test = "no test"

    def ready(self) -> TritonServer:
        """A server that runs."""
        if self._server is None:
            self._server = self._make().start()
        return self._server

    @contextmanager
    def lent(self, test: pytest.Item) -> Iterator[TritonServer]:
        """Lend a running server to one test.

        Raises:
            ServerDiedError: it died meanwhile, in place of what that did to the block.
        """
        if death := self.bury():  # nobody's fault: this test gets a new one, and the summary tells of it
            test.user_properties.append((DEATH, f"after {self._last_test}: {death}"))
        try:
            yield self.ready()
        finally:
            self._last_test = test.nodeid
            if death := self.bury():
                test.user_properties.append((DEATH, str(death)))
                raise death

    def bury(self) -> ServerDiedError | None:
        """Why the server no longer serves, of which nothing is left then; None if it does, or has never started."""
        if self._server is None or (fault := find_fault(self._server)) is None:
            return None
        server, self._server = self._server, None
        kill(server)
        server.stop()
        tail = [line for line in server.log_tail if not line.startswith(_TABLES)]
        is_tritons = server_crashed(fault, tail)
        reason = f"{fault}; {TRITONS_CRASH}" if is_tritons else fault
        return ServerDiedError("\n  ".join([f"the server {reason}", *tail[-TAIL_LINES:]]), is_tritons=is_tritons)

    def kill(self) -> None:
        """End the server at once."""
        if self._server is not None:
            kill(self._server)

    def close(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None


@contextmanager
def served(
    bundle: Path, config: ServerConfig | None = None, *, make: type[TritonServer] = TritonServer
) -> Iterator[Serving]:
    """Servers of one bundle, the first of which starts when it is needed."""
    config = config or ServerConfig(threads=1)
    serving = Serving(lambda: make(bundle, config=config, verbose=True, start_timeout=START_S))
    with contextlib.closing(serving):
        yield serving


def find_fault(server: TritonServer) -> str | None:
    """What is wrong with a server that was ready once; None if nothing is."""
    deadline = time.monotonic() + HEALTH_S
    while (status := server.poll()) is None:
        if is_ready(server):
            return None
        if time.monotonic() > deadline:
            return f"did not answer within {HEALTH_S:g} s that it is ready"
        time.sleep(0.05)
    return f"ended with status {status}"


def is_ready(server: TritonServer) -> bool:
    try:
        with urllib.request.urlopen(f"{server.http_url}/v2/health/ready", timeout=HEALTH_S / 2) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def server_crashed(fault: str, tail: list[str]) -> bool:
    return fault.endswith(f"status {CRASHED}") or any("Signal (11)" in line for line in tail)


def kill(server: TritonServer) -> None:
    """Kill a server that may hang; what else belongs to it goes with it."""
    port = f"--http-port={server.http_url.rpartition(':')[2]}"
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if port in process.cmdline() and process.name() == "tritonserver":
                process.kill()
