"""A peer's process: started, asked, measured, and ended with everything that it has started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from benchmarks.compare.programs.protocol import Job
from benchmarks.memory import resident

_ROOT = Path(__file__).resolve().parents[2]
_SETTINGS = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
_PATIENCE_S = 30.0


class PeerError(Exception):
    """A peer failed; the message is its own."""


class Peer:
    """A process that speaks :mod:`benchmarks.compare.programs.protocol`; a context manager.

    Args:
        command: the process.
        log: file that takes what it prints.
        threads: bound on the threads of numerical libraries.

    Raises:
        PeerError: on entering, the process ended before it was ready.
    """

    def __init__(self, command: Sequence[str | Path], log: Path, threads: int) -> None:
        self._command = command
        self._log = log
        self._threads = threads
        self.versions: Mapping[str, str] = {}

    def __enter__(self) -> Peer:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=_ROOT,
                env={**os.environ, **_SETTINGS, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": str(self._threads)},
                start_new_session=True,
            )
        try:
            self.versions = self._read()["versions"]
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def ask(self, job: Job) -> Mapping[str, Any]:
        """Have a job done.

        Raises:
            PeerError: it failed.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # reading says that it has ended
        return self._read()

    def memory_bytes(self) -> int:
        """Resident, of it and what it has started, shared pages once."""
        return resident(psutil.Process(self._process.pid))

    def _read(self) -> Mapping[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"it ended with status {self._process.wait()}; see {self._log}")
        try:
            message: Mapping[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            raise PeerError(f"it said {line.rstrip()!r}, which is no answer; see {self._log}") from None
        if "error" in message:
            raise PeerError(f"{message['error']}; see {self._log}")
        return message

    def _end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()
