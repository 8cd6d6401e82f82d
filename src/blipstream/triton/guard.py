"""The guard: a small process between the launcher and ``tritonserver`` that cleans up whatever happens to either.

    python guard.py JSON

Run as a file of its own, with the standard library alone and the server's environment. ``JSON`` holds ``command``,
``folder`` (the server's temporary folder), ``shm_prefix`` (of its regions in /dev/shm), ``lifeline_variable`` and
``stop_timeout``. Its standard input is a pipe from the launcher: when that ends, because the launcher closes it or dies
of anything, the server is stopped, in haste if the launcher wrote a byte first. When the server ends, by itself or
stopped, what it left behind (processes, shared memory, the folder) is removed, and the guard exits with its status. If
the guard itself dies, the server gets a SIGTERM.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.05
HASTE_S = 2.0
SHM = Path("/dev/shm")


def main(job: dict[str, Any]) -> int:
    """Run the server until it ends or the launcher does; return its exit status."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the launcher decides; this process sees the end of the pipe
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # models whose server has died become children of this process
    lifeline, lifeline_end = os.pipe()
    server = subprocess.Popen(
        job["command"],
        env={**os.environ, job["lifeline_variable"]: str(lifeline)},
        stdin=subprocess.DEVNULL,
        pass_fds=(lifeline,),
        preexec_fn=bind_to_parent,
    )
    os.close(lifeline)
    try:
        word = None
        while server.poll() is None and word is None:
            reap(server.pid)
            word = listen()
        os.close(lifeline_end)
        stop(server, HASTE_S if word else job["stop_timeout"])
    finally:
        clean_up(server.pid, Path(job["folder"]), job["shm_prefix"])
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


def bind_to_parent() -> None:
    """In the server's process, before it runs: a process group of its own, and SIGTERM when the guard dies."""
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def prctl(option: int, value: int) -> None:
    """``prctl(2)`` of Linux."""
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def listen() -> bytes | None:
    """Wait a moment; return what the launcher said: a byte, none when it is gone, or None when it was silent."""
    ready, _, _ = select.select([0], [], [], POLL_S)
    return os.read(0, 1) if ready else None


def stop(server: subprocess.Popen[bytes], timeout: float) -> None:
    """Ask the server to stop; kill it when it has not after ``timeout`` seconds."""
    if server.poll() is not None:
        return
    server.send_signal(signal.SIGTERM)
    try:
        server.wait(timeout)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def clean_up(group: int, folder: Path, shm_prefix: str) -> None:
    """Kill what is left of the server's process group, and remove its shared memory and its folder."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    reap(group, wait=True)
    for region in SHM.glob(f"{shm_prefix}*"):
        region.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def reap(server: int, *, wait: bool = False) -> None:
    """Collect adopted processes that have ended; with ``wait``, all that were killed, for some seconds at most."""
    deadline = time.monotonic() + 5.0
    while True:
        try:
            # WNOWAIT looks without collecting: the server itself belongs to its Popen object
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is not None and (ended.si_pid != server or wait):
            os.waitpid(ended.si_pid, 0)
        elif not wait or time.monotonic() > deadline:
            return
        else:
            time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
