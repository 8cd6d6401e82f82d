"""What the container starts, with the pip-installed ``tritonserver`` in place of the container's."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from blipstream.triton.installation import Installation
from blipstream.triton.server import HOST, SERVICES, answers_ok, choose_ports
from tests.server.wire import PATIENCE_S, Stream, ask, wait_until

pytestmark = [pytest.mark.server, pytest.mark.slow]


class Container:
    """``python3 -m blipstream.triton.container`` as process of its own."""

    def __init__(self, bundle: Path, folder: Path, temporary: str) -> None:
        installation = Installation.find()
        backends = folder / "backends"
        backends.mkdir()
        installation.make_backends(backends)
        environment = installation.environment(threads=1)
        environment["PATH"] = os.pathsep.join([environment["PATH"], str(installation.binary.parent)])
        self.ports = choose_ports(dict.fromkeys(SERVICES, 0))
        addresses = [
            f"--{name}-{kind}" for name, port in self.ports.items() for kind in (f"address={HOST}", f"port={port}")
        ]
        region = f"--backend-config=python,shm-region-prefix-name=blipstream_{os.getpid()}_"
        options = [f"--backend-directory={backends}", region, *addresses]
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "blipstream.triton.container", str(bundle), *options],
                env={**environment, "TMPDIR": temporary},
                stdout=log,
                stderr=log,
            )

    @property
    def url(self) -> str:
        return f"{HOST}:{self.ports['grpc']}"

    def is_ready(self) -> bool:
        assert self.process.poll() is None
        return answers_ok(self.ports["http"], "/v2/health/ready")


@pytest.fixture
def running(bundle: Path, tmp_path: Path) -> Iterator[Container]:
    hostile = Path(shutil.copytree(bundle, tmp_path / "$(touch PWNED) \u00fc\udcff"))
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary:
        container = Container(hostile, tmp_path, temporary)
        try:
            wait_until(container.is_ready)
            yield container
        finally:
            container.process.kill()
            container.process.wait(PATIENCE_S)


def test_it_serves_and_drains(running: Container, image: bytes) -> None:
    assert ask(running.url, image=image, max_tokens=3).num_output_tokens == 3
    wanted = 1000
    with Stream(running.url, image=image, max_tokens=wanted, min_tokens=wanted, stream=True) as stream:
        stream.next()
        running.process.send_signal(signal.SIGTERM)
        last = stream.rest()[-1]
    assert last.num_output_tokens == wanted, "a running request is answered to its end"
    assert running.process.wait(PATIENCE_S) == 0
