"""``preprocess``: images are decoded in processes, and what one image costs or breaks is its own request's."""

from __future__ import annotations

import io
import multiprocessing
import multiprocessing.spawn
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blipstream.config import ServerConfig
from blipstream.errors import BlipstreamError, EngineError, InvalidImageError, ServerBusyError
from blipstream.image_files import ImageLimits
from blipstream.preprocess import ImageTransform
from blipstream.triton import image_pool
from blipstream.triton.image_pool import ImagePool
from blipstream.triton.preprocess import PreprocessModel
from tests.unit.triton.fakes import Request, TritonError, backend_module, make_manifest

TRANSFORM = ImageTransform(make_manifest().image)


def encoded(size: tuple[int, int] = (20, 10), file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.effect_mandelbrot(size, (-2, -1, 1, 1), 20).save(buffer, file_format, **options)
    return buffer.getvalue()


SMALL, LARGE = encoded(), encoded((200, 160), "JPEG")


# --- the processes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ImagePool]:
    for name, value in getattr(request, "param", {}).items():
        monkeypatch.setattr(image_pool, name, value)
    pool = ImagePool(TRANSFORM, ImageLimits(), 0.05, 1)
    yield pool
    pool.close()


@pytest.mark.parametrize("pool", [{"QUICK_PIXELS": 1000}, {"QUICK_BYTES": len(SMALL)}], indirect=True)
def test_both_lanes_are_exact(pool: ImagePool) -> None:
    for file in (SMALL, LARGE, SMALL):
        np.testing.assert_array_equal(pool.decode(file), TRANSFORM.decode(file))


@pytest.mark.parametrize("pool", [{"QUICK_PIXELS": 1000, "MAX_SLOW": 0}], indirect=True)
def test_costly_images_are_refused_when_too_many_wait_and_others_are_not(pool: ImagePool) -> None:
    for file in (LARGE, encoded((40, 40))):
        with pytest.raises(ServerBusyError, match="0 images of many pixels or of long decoding are waiting already"):
            pool.decode(file)
    np.testing.assert_array_equal(pool.decode(SMALL), TRANSFORM.decode(SMALL))


def large_png() -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((5000, 5000), Image.Resampling.NEAREST).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def spelt_out_header() -> bytes:
    """A JPEG whose markers never come: Pillow reads it byte by byte."""
    return b"\xff\xd8" + b"\xff" * 20_000_000


@pytest.mark.parametrize("make", [spelt_out_header, large_png])
def test_an_image_that_takes_long_is_given_up_and_leaves_nothing_behind(pool: ImagePool, make: Any) -> None:
    with pytest.raises(InvalidImageError, match=r"takes more than 0\.05 s of CPU time .*`--max-image-seconds`"):
        pool.decode(make())
    np.testing.assert_array_equal(pool.decode(SMALL), TRANSFORM.decode(SMALL))


def test_processes_that_were_killed_are_replaced(pool: ImagePool) -> None:
    for process in multiprocessing.active_children():
        process.kill()
        process.join(60)
    assert not multiprocessing.active_children()
    np.testing.assert_array_equal(pool.decode(SMALL), TRANSFORM.decode(SMALL))


def test_a_process_that_cannot_work_is_not_the_images_fault(pool: ImagePool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.close()
    monkeypatch.setattr(multiprocessing.spawn, "get_preparation_data", lambda _: {"sys_path": []})
    with pytest.raises(EngineError, match="a process that decodes images ended with status 1"):
        pool.decode(SMALL)


@pytest.mark.parametrize("file", [b"", b"no image", SMALL[:45], b"/tmp/photo"])
def test_errors_come_back_as_they_are(pool: ImagePool, file: bytes) -> None:
    with pytest.raises(InvalidImageError) as expected:
        TRANSFORM.decode(file)
    with pytest.raises(BlipstreamError) as caught:
        pool.decode(file)
    assert (type(caught.value), str(caught.value)) == (InvalidImageError, str(expected.value))


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PreprocessModel]:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend_module())
    config = ServerConfig(threads=1, max_image_pixels=10_000, jpeg_oversampling=getattr(request, "param", 0))
    for name, value in config.to_environment().items():
        monkeypatch.setenv(name, value)
    make_manifest().dump(tmp_path)
    model = PreprocessModel()
    model.initialize(
        {"model_name": "preprocess", "model_repository": str(tmp_path / "preprocess"), "model_version": "1"}
    )
    yield model
    model.finalize()


def answers(model: PreprocessModel, *batches: list[bytes]) -> list[Any]:
    """For each request: its pixels or its error, after all were answered."""
    requests = [Request({"image": np.array([[file] for file in files], np.object_)}) for files in batches]
    model.execute(requests)
    model._threads.shutdown()
    responses: list[Any] = [request.sender.sent[-1][0] for request in requests]
    return [found.error() if found.has_error() else found.output_tensors()[0].as_numpy() for found in responses]


def test_bad_images_fail_their_own_requests_alone(model: PreprocessModel) -> None:
    other = encoded((30, 20))
    files = [
        [SMALL],
        [b"not an image"],
        [other],
        [SMALL[:45]],
        [b""],
        [encoded((200, 200))],
        [SMALL, other],
        [SMALL, b"?"],
    ]
    found = answers(model, *files)
    for index in (0, 2, 6):
        np.testing.assert_array_equal(found[index], [TRANSFORM.decode(file) for file in files[index]])
    for index, fault in {1: "no known", 3: "truncated", 4: "is empty", 5: "40000 pixels", 7: "no known"}.items():
        assert found[index].code() == TritonError.INVALID_ARG
        assert fault in found[index].message()


@pytest.mark.parametrize("model", [0, 2], indirect=True)
def test_large_jpegs_are_reduced_if_the_server_is_told_to(
    model: PreprocessModel, request: pytest.FixtureRequest
) -> None:
    oversampling = request.node.callspec.params["model"]
    file = encoded((100, 80), "JPEG")
    (found,) = answers(model, [file])
    expected = [ImageTransform(make_manifest().image, times).decode(file) for times in (0, 2)]
    assert not np.array_equal(*expected)
    np.testing.assert_array_equal(found[0], expected[oversampling // 2])
