"""A bundle of TensorRT plans behind a real server, on a simulated GPU: the models of the pip-installed server, with
caches on the device and decode steps as CUDA graphs, answer as the checkpoint does."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from blipstream_export.build import BuildOptions

from blipstream.errors import ServerStartError
from blipstream.manifest import Manifest
from blipstream.repository import write_models
from blipstream.triton import folder as server_folder
from blipstream.triton.server import TritonServer
from tests.server.faithful import Ask, Reference, ask_concurrently, assert_equal
from tests.simulated import FOLDER
from tests.support.bundles import bundle_of, checkpoint_of
from tests.support.checkpoints import PROMPTS, make_images, save_blip2
from tests.support.servers import START_S, Serving, served

pytestmark = [pytest.mark.server, pytest.mark.slow]


@pytest.fixture(scope="module", params=["t5"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return checkpoint_of(save_blip2, request.param, seed=0)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return bundle_of(checkpoint, BuildOptions(engine="tensorrt", max_sequences=5))


class SimulatedServer(TritonServer):
    """Its models find the simulated packages: a model imports from its own folder before all others."""

    def start(self) -> SimulatedServer:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server_folder, "write_models", write_models_with_packages)
            return super().start()


def write_models_with_packages(folder: Path, manifest: Manifest, **options: bool) -> None:
    write_models(folder, manifest, **options)
    for model in ("vision_encoder", "qformer", "blip2"):
        shutil.copytree(FOLDER, folder / model / "1", dirs_exist_ok=True)


@pytest.fixture(scope="module")
def serving(bundle: Path) -> Iterator[Serving]:
    with served(bundle, make=SimulatedServer) as serving:
        yield serving


def test_mixed_requests_equal_the_checkpoint(server: TritonServer, checkpoint: Path) -> None:
    asks = [Ask(image, PROMPTS[i % len(PROMPTS)]) for i, image in enumerate(make_images(32, seed=1))]
    answers = ask_concurrently(server.grpc_url, asks, max_tokens=16)
    assert_equal(Reference(checkpoint), asks, answers, max_new_tokens=16)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_without_tensorrt_the_server_says_what_to_install(bundle: Path) -> None:
    with pytest.raises(ServerStartError, match=r"tensorrt is not installed: `pip install -e '\.\[tensorrt\]'`"):
        start_and_stop(bundle)


def start_and_stop(bundle: Path) -> None:
    with TritonServer(bundle, start_timeout=START_S):
        pass
