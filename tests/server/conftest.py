"""One server for the tests of this folder, over a bundle of a random checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from blipstream.config import ServerConfig
from blipstream.triton.server import TritonServer
from tests.checkpoints import make_images, save_blip2_opt
from tests.server.wire import png

SLOTS = 3
"""Few, so that a few requests fill them."""
ROW_TOKENS = 20_000
"""Many, so that a request can keep its slot for as long as a test needs."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    opt = {"max_position_embeddings": ROW_TOKENS}
    return save_blip2_opt(tmp_path_factory.mktemp("random") / "checkpoint", seed=3, opt=opt)


@pytest.fixture(scope="session")
def bundle(checkpoint: Path) -> Path:
    from blipstream_export.build import BuildOptions, build

    folder = checkpoint.parent / "bundle"
    build(str(checkpoint), folder, BuildOptions(max_sequences=SLOTS, max_tokens=ROW_TOKENS))
    return folder


@pytest.fixture(scope="session")
def server(bundle: Path) -> Iterator[TritonServer]:
    config = ServerConfig(threads=1, queue_size=24, max_image_bytes=4 << 20, max_image_pixels=2_000_000)
    with TritonServer(bundle, config=config, verbose=True) as server:
        yield server


@pytest.fixture(scope="session")
def images() -> list[bytes]:
    """PNG files of different contents."""
    return [png(image) for image in make_images(8, seed=5)]


@pytest.fixture
def image(images: list[bytes]) -> bytes:
    return images[0]
