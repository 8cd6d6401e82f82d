"""Running one part: a process group of its own, with a time limit, whose outcome is on disk as soon as it is known."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["done", "failed", "timed out", "skipped"]

OUTCOME_FILE, LOG_FILE = "outcome.json", "output.log"
_TAIL_LINES = 30
_TAIL_BYTES = 1 << 16
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}
"""Nothing is fetched from a network, and a log holds lines, no progress bars."""


@dataclass(frozen=True)
class Outcome:
    """How a part went.

    Attributes:
        status: ``skipped`` was not run, for ``reason``.
        reason: one sentence; empty for a part that is done.
        seconds: that it took.
        tail: the last lines that it said, of a part that was not done.
    """

    status: Status
    reason: str = ""
    seconds: float = 0.0
    tail: str = ""

    def write(self, folder: Path) -> None:
        """Leave it in the part's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / OUTCOME_FILE).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Outcome | None:
        """The outcome in a part's folder; None when there is none."""
        path = folder / OUTCOME_FILE
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def run_part(
    command: Sequence[str], folder: Path, limit: float, *, working: Path, passing: Collection[int] = (0,)
) -> Outcome:
    """Run a part; its folder is emptied before, and holds its output and its outcome afterwards.

    Args:
        command: the process.
        folder: of the part.
        limit: seconds that it may take; then it is killed, with every process that it has started.
        working: directory to run in.
        passing: exit statuses of a part that is done.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.monotonic()
    with (folder / LOG_FILE).open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=working,
            env={**os.environ, **_QUIET},
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _kill_group(process)
    outcome = _outcome(status, limit, time.monotonic() - started, passing, folder)
    outcome.write(folder)
    return outcome


def _outcome(status: int | None, limit: float, seconds: float, passing: Collection[int], folder: Path) -> Outcome:
    seconds = round(seconds, 1)
    if status is None:
        return Outcome("timed out", f"it was killed after {limit:g} s", seconds, tail_of(folder / LOG_FILE))
    if status in passing:
        return Outcome("done", seconds=seconds)
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    return Outcome("failed", f"it ended with {how}", seconds, tail_of(folder / LOG_FILE))


def tail_of(log: Path) -> str:
    """The last lines of a log."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return "\n".join(lines[-_TAIL_LINES:])


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End whatever of the part still runs."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
