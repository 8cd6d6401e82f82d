"""A naive Triton server: python -m benchmarks.compare.programs.naive_triton CHECKPOINT THREADS DTYPE

One Python model around ``generate`` (``naive/``), on the server that Blipstream has installed; a job's requests are
sent all at once. It runs in the project's own environment, which has that server.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton

from benchmarks.compare.programs.protocol import Job, Output, serve
from blipstream.triton.installation import Installation
from blipstream.triton.server import HOST, answers_ok, choose_ports

REPOSITORY = Path(__file__).with_name("naive")
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_START_S = 600.0


@contextmanager
def running(checkpoint: str, threads: int, dtype: str) -> Iterator[str]:
    """``host:port`` of gRPC, while the server runs."""
    ports = choose_ports({"grpc": 0, "http": 0})
    installation = Installation.find()
    settings = {"NAIVE_CHECKPOINT": checkpoint, "NAIVE_DTYPE": _DTYPES[dtype], "NAIVE_THREADS": str(threads)}
    with tempfile.TemporaryDirectory(prefix="naive-") as folder:
        installation.make_backends(Path(folder))
        services = [
            f"--{name}-{key}={value}" for name in ports for key, value in (("address", HOST), ("port", ports[name]))
        ]
        command = [installation.binary, f"--model-repository={REPOSITORY}", f"--backend-directory={folder}", *services]
        environment = {**installation.environment(threads), **settings}
        server = subprocess.Popen([*command, "--allow-metrics=false"], env=environment, stdout=sys.stderr)
        try:
            _wait(server, ports["http"])
            yield f"{HOST}:{ports['grpc']}"
        finally:
            server.terminate()
            server.wait()


def _wait(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _START_S
    while not answers_ok(port, "/v2/health/ready"):
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("the naive server did not become ready")
        time.sleep(0.2)


def ask(client: triton.InferenceServerClient, request: dict[str, Any]) -> list[int]:
    """Tokens of one answer."""
    image = np.array([Path(request["image"]).read_bytes()], np.object_)
    prompt = np.array([request["prompt"].encode()], np.object_)
    inputs = []
    for name, value in (("image", image), ("prompt", prompt), ("tokens", np.array([request["tokens"]], np.int32))):
        inputs.append(triton.InferInput(name, [1], "INT32" if name == "tokens" else "BYTES"))
        inputs[-1].set_data_from_numpy(value)
    ids: list[int] = client.infer("blip2", inputs).as_numpy("output_ids").tolist()
    return ids


def main(checkpoint: str, threads: str, dtype: str) -> None:
    """Start the server, and pass jobs on to it."""
    with running(checkpoint, int(threads), dtype) as url, triton.InferenceServerClient(url) as client:

        def answer(job: Job) -> Output:
            with ThreadPoolExecutor(len(job["requests"])) as pool:
                return list(pool.map(lambda request: ask(client, request), job["requests"]))

        serve(lambda: answer, ("nvidia-pytriton", "transformers", "torch"))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(*sys.argv[1:])
