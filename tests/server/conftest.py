"""One server for the tests of this folder, over a bundle of a random checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from blipstream.config import ServerConfig
from blipstream.triton.server import TritonServer
from tests.server.wire import png
from tests.support.bundles import bundle_of, checkpoint_of
from tests.support.checkpoints import make_images, save_blip2_opt
from tests.support.servers import Serving, served

SLOTS = 3
"""Few, so that a few requests fill them."""
QUEUE_SIZE = 24
ROW_TOKENS = 12_000
"""Many, so that a request can keep its slot for as long as a test needs."""
CONFIG = ServerConfig(threads=1, queue_size=QUEUE_SIZE, max_image_bytes=4 << 20, max_image_pixels=2_000_000)


@pytest.fixture(scope="session", autouse=True)
def _no_shared_memory_is_left() -> Iterator[None]:
    """Of all servers that this process has started."""
    yield
    assert not list(Path("/dev/shm").glob(f"blipstream_{os.getpid()}_*"))


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    return checkpoint_of(save_blip2_opt, seed=3, opt={"max_position_embeddings": ROW_TOKENS})


@pytest.fixture(scope="session")
def bundle(checkpoint: Path) -> Path:
    from blipstream_export.build import BuildOptions

    return bundle_of(checkpoint, BuildOptions(max_sequences=SLOTS, max_tokens=ROW_TOKENS))


@pytest.fixture(scope="session")
def serving(bundle: Path) -> Iterator[Serving]:
    """A module that needs a server of another bundle or configuration has a fixture of this name of its own."""
    with served(bundle, CONFIG) as serving:
        yield serving


@pytest.fixture
def server(serving: Serving, request: pytest.FixtureRequest) -> Iterator[TritonServer]:
    """A running server; the test in whose time it dies fails."""
    with serving.lent(request.node) as server:
        yield server


@pytest.fixture(scope="session")
def images() -> list[bytes]:
    """PNG files of different contents."""
    return [png(image) for image in make_images(8, seed=5)]


@pytest.fixture
def image(images: list[bytes]) -> bytes:
    return images[0]
