"""Blipstream as one of the systems: a server, asked by its client."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tritonclient.grpc as triton
from blipstream_client import Client

from benchmarks.compare.programs.protocol import Job
from benchmarks.memory import resident
from blipstream.config import ServerConfig
from blipstream.contract import IMAGE, IMAGE_EMBEDS, IMAGE_FEATURES, PIXEL_VALUES, SOFT_TOKENS, VISION_ENCODER
from blipstream.triton.server import TritonServer

CLIENTS = 16
"""Requests that are under way at once, of a job that has as many."""
_TIMEOUT_S = 1200.0


class Blipstream:
    """A server of a bundle; a context manager. It answers what :class:`benchmarks.compare.process.Peer` answers."""

    def __init__(self, bundle: Path) -> None:
        self._server = TritonServer(bundle, config=ServerConfig(request_timeout=_TIMEOUT_S))
        self.versions = {"blipstream": version("blipstream"), "onnxruntime": version("onnxruntime")}

    def __enter__(self) -> Blipstream:
        others = {child.pid for child in psutil.Process().children()}  # a peer's process
        self._server.start()
        self._processes = [child for child in psutil.Process().children() if child.pid not in others]
        self._client = Client(self._server.grpc_url, timeout=_TIMEOUT_S)
        self._triton = triton.InferenceServerClient(self._server.grpc_url)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._client.close()
        self._triton.close()
        self._server.stop()

    def ask(self, job: Job) -> Mapping[str, Any]:
        """Have a job done; raises what the client raises."""
        requests = job["requests"]
        if job["task"] == "features":
            files = np.array([[Path(request["image"]).read_bytes()] for request in requests], np.object_)
            np.save(job["output"], self._infer(IMAGE_FEATURES, IMAGE.name, files, SOFT_TOKENS.name))
            return {}
        if job["task"] == "vision":
            pixels = np.concatenate([np.load(request["pixels"]) for request in requests])
            np.save(job["output"], self._infer(VISION_ENCODER, PIXEL_VALUES.name, pixels, IMAGE_EMBEDS.name))
            return {}
        with ThreadPoolExecutor(min(CLIENTS, len(requests))) as clients:
            return {"tokens": list(clients.map(self._generate, requests))}

    def memory_bytes(self) -> int:
        """Resident, of the server's processes, shared pages once."""
        return sum(map(resident, self._processes))

    def _infer(self, model: str, name: str, value: np.ndarray[Any, Any], output: str) -> np.ndarray[Any, Any]:
        tensor = triton.InferInput(name, value.shape, "BYTES" if value.dtype == np.object_ else "FP32")
        tensor.set_data_from_numpy(value)
        result: np.ndarray[Any, Any] = self._triton.infer(model, [tensor]).as_numpy(output)
        return result

    def _generate(self, request: dict[str, Any]) -> list[int]:
        length, image = request["tokens"], Path(request["image"])
        answer = self._client.generate(image, request["prompt"], max_tokens=length, min_tokens=length)
        return list(answer.token_ids)
