"""Starting and stopping a ``tritonserver`` that serves one bundle on this machine.

with TritonServer(Path("bundle")) as server:
    client = tritonclient.grpc.InferenceServerClient(server.grpc_url)
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import math
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING

from blipstream.bundle import check_bundle
from blipstream.config import ServerConfig
from blipstream.errors import ServerStartError
from blipstream.manifest import Manifest
from blipstream.triton import guard
from blipstream.triton.folder import ServerFolder
from blipstream.triton.installation import Installation
from blipstream.triton.lifeline import LIFELINE_VARIABLE
from blipstream.triton.log import LogPump, find_cause, has_failed, is_alarming, is_passing
from blipstream.triton.machine import check_machine, has_dead_model, shared_memory_warning

if TYPE_CHECKING:
    from typing_extensions import Self

HOST = "127.0.0.1"
"""The server is bound to the loopback address alone (:mod:`blipstream.triton.installation` says why)."""

SERVICES = ("grpc", "http", "metrics")
_ATTEMPTS = 3
"""Starts, when a port that was chosen here is taken by someone else before the server binds it, or Triton fails by a
race of its own."""
_POLL_S = 0.05
_SILENCE_S = 3.0
"""Time that the server has to say why a model's process died."""
_UNLOAD_S = 30.0
"""Time beyond the grace that the server has to unload its models."""
_KILL_AFTER_S = 10.0
"""Time that it has to exit when that was not enough; it does not, where requests are still unanswered."""


class TritonServer:
    """A server of one bundle: :meth:`start` it or use it as a context manager.

    Args:
        bundle: folder of the bundle.
        grpc_port: port of each service on the loopback address; 0 chooses a free one.
        http_port: as ``grpc_port``.
        metrics_port: as ``grpc_port``.
        config: settings of the models.
        log_file: takes all that the server says; by default, warnings and errors go to standard error.
        verbose: all that the server says goes to standard error.
        start_timeout: seconds that the server has to load the models.
        verify: check the hashes of all files of the bundle, graphs included, before the start.
    """

    def __init__(
        self,
        bundle: Path,
        *,
        grpc_port: int = 0,
        http_port: int = 0,
        metrics_port: int = 0,
        config: ServerConfig | None = None,
        log_file: Path | None = None,
        verbose: bool = False,
        start_timeout: float = 600.0,
        verify: bool = False,
    ) -> None:
        self._bundle = bundle
        self._verify = verify
        self._wanted_ports = dict(zip(SERVICES, (grpc_port, http_port, metrics_port), strict=True))
        self._config = config or ServerConfig()
        self._log_file = log_file
        self._verbose = verbose
        self._start_timeout = start_timeout
        self._ports: Mapping[str, int] = self._wanted_ports
        self._guard: subprocess.Popen[bytes] | None = None
        self._log: LogPump | None = None
        self._log_stream: IO[bytes] | None = None
        self._folder: ServerFolder | None = None

    @property
    def grpc_url(self) -> str:
        """``host:port`` of the gRPC service."""
        return f"{HOST}:{self._ports['grpc']}"

    @property
    def http_url(self) -> str:
        """URL of the HTTP service."""
        return f"http://{HOST}:{self._ports['http']}"

    @property
    def metrics_url(self) -> str:
        """URL of the metrics."""
        return f"http://{HOST}:{self._ports['metrics']}/metrics"

    @property
    def log_tail(self) -> list[str]:
        """The last lines that the server said."""
        return self._log.tail() if self._log else []

    @property
    def log_fault(self) -> str | None:
        """Why some of what the server said is not in the log file; None when all is."""
        fault = self._log and self._log.fault
        return f"the log file {self._log_file} cannot be written: {fault.strerror}" if fault else None

    def start(self) -> Self:
        """Start the server and wait until every model is ready.

        Raises:
            BundleError: the bundle is missing, incomplete or damaged.
            ServerStartError: a port is taken, ``tritonserver`` is not installed, or it did not become ready; nothing is
                left of it then, and the message names the cause.
        """
        if self._guard is not None:
            raise ServerStartError(f"the server of {self._bundle} is running already")
        manifest = check_bundle(self._bundle, verify=self._verify)
        installation = Installation.find()
        warning = shared_memory_warning(manifest, self._config)
        if warning:
            print(f"blipstream: {warning}", file=sys.stderr)
        for attempt in range(1, _ATTEMPTS + 1):
            self._ports = choose_ports(self._wanted_ports)
            try:
                self._launch(installation, manifest)
                self._wait_until_ready()
                return self
            except ServerStartError as error:
                again = attempt < _ATTEMPTS and self._is_passing(error)
                self._stop(hastily=True)
                if not again:
                    raise
            except BaseException:
                self.stop()
                raise
        raise AssertionError("the last attempt returns or raises")

    def _is_passing(self, error: ServerStartError) -> bool:
        port_lost = "in use" in str(error) and not all(self._wanted_ports.values())
        return port_lost or is_passing(self.log_tail)

    def stop(self) -> None:
        """Stop the server and wait until nothing of it is left. May be called twice."""
        self._stop(hastily=False)

    def _stop(self, *, hastily: bool) -> None:
        if self._guard is not None and self._guard.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._guard.stdin.write(b"!" if hastily else b"")
                self._guard.stdin.close()
            self._guard.wait()
            self._guard = None
        if self._log is not None:
            self._log.join()
        if self._log_stream is not None:
            self._log_stream.close()
            self._log_stream = None
        if self._folder is not None:
            self._folder.close()  # the guard has done it, unless it never ran
            self._folder = None

    def poll(self) -> int | None:
        """Exit status of a server that ended by itself; None while it runs."""
        return None if self._guard is None else self._guard.poll()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def _launch(self, installation: Installation, manifest: Manifest) -> None:
        write = self._open_log()
        folder = self._folder = ServerFolder()
        folder.fill(self._bundle, manifest, embedded=True)
        shm_prefix = f"blipstream_{os.getpid()}_{secrets.token_hex(4)}_"
        environment = installation.environment(self._config.threads, folder.safe)
        check_machine(environment)
        try:
            installation.make_backends(folder.backends)
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", guard.__file__, json.dumps(self._job(installation, folder, shm_prefix))],
                env={**environment, **self._config.to_environment(), **folder.environment()},
                cwd=folder.path,  # the caller's may be gone, or hold modules of the models' names
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C on the terminal reaches the launcher alone
            )
        except OSError as error:
            raise ServerStartError(f"the server's process cannot be started: {error.strerror}") from None
        if self._guard.stdout is None:
            raise AssertionError("the guard's output is a pipe")
        wanted = None if self._verbose or self._log_file else is_alarming
        self._log = LogPump(self._guard.stdout, write, wanted, folder.restore)

    def _job(self, installation: Installation, folder: ServerFolder, shm_prefix: str) -> dict[str, object]:
        return {
            "command": self._command(installation, folder, shm_prefix),
            "folder": str(folder.path),
            "shm_prefix": shm_prefix,
            "lifeline_variable": LIFELINE_VARIABLE,
            "stop_timeout": self._config.stop_grace + _UNLOAD_S + _KILL_AFTER_S,
        }

    def _command(self, installation: Installation, folder: ServerFolder, shm_prefix: str) -> list[str]:
        services = [
            argument
            for name in SERVICES
            for argument in (f"--{name}-address={HOST}", f"--{name}-port={self._ports[name]}")
        ]
        return [
            str(installation.binary),
            f"--model-repository={folder.models}",
            f"--backend-directory={folder.backends}",
            f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
            *services,
            "--disable-auto-complete-config",  # the configurations are complete; it would load each model twice
            "--allow-gpu-metrics=false",
            "--pinned-memory-pool-byte-size=0",
            f"--exit-timeout-secs={math.ceil(self._config.stop_grace + _UNLOAD_S)}",
        ]

    def _open_log(self) -> Callable[[str], object]:
        """What takes each line of the server."""
        if self._log_file is None:
            return lambda line: print(line, file=sys.stderr)
        try:
            self._log_stream = stream = self._log_file.open("ab", buffering=0)
        except OSError as error:
            raise ServerStartError(f"the log file {self._log_file} cannot be written: {error.strerror}") from None
        return lambda line: stream.write(f"{line}\n".encode("utf-8", "surrogateescape"))

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._start_timeout
        while not (
            answers_ok(self._ports["http"], "/v2/health/ready") and answers_ok(self._ports["metrics"], "/metrics")
        ):
            if self.poll() is not None or has_failed(self.log_tail):
                self._fail("did not start")
            if self._has_dead_model():
                self._fail("did not start, as a model's process died")
            if self.log_fault:
                raise ServerStartError(self.log_fault)
            if time.monotonic() > deadline:
                self._fail(f"was not ready after {self._start_timeout:g} s")
            time.sleep(_POLL_S)

    def _fail(self, what: str) -> None:
        if self._log is not None and self.poll() is not None:
            self._log.join()
        raise ServerStartError(f"tritonserver {what}: {find_cause(self.log_tail)}")

    def _has_dead_model(self) -> bool:
        """Whether a model's process has died, and the server says nothing of it for a while."""
        if self._guard is None or not has_dead_model(self._guard.pid):
            return False
        time.sleep(_SILENCE_S)
        return not has_failed(self.log_tail) and self.poll() is None and has_dead_model(self._guard.pid)


def choose_ports(wanted: Mapping[str, int]) -> dict[str, int]:
    """Check the ports that are given, and replace each 0 by a free port.

    Raises:
        ServerStartError: a port is taken, given twice or no port; the message names it.
    """
    given = [port for port in wanted.values() if port]
    if len(set(given)) < len(given):
        raise ServerStartError(f"each service needs a port of its own, but the ports are {wanted}")
    with contextlib.ExitStack() as held:  # all are bound at once, so that no two are the same
        return {name: held.enter_context(_bound(name, port)).getsockname()[1] for name, port in wanted.items()}


def _bound(service: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: old connections may linger
        listener.bind((HOST, port))
        listener.listen(1)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = "it is taken" if isinstance(error, OSError) and error.errno == errno.EADDRINUSE else str(error)
        raise ServerStartError(f"port {port} on {HOST} cannot be used for the {service} service: {reason}") from None
    return listener


def answers_ok(port: int, path: str) -> bool:
    """Whether an HTTP service on the loopback address answers a GET with status 200."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5.0)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
