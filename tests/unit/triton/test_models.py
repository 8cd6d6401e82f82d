"""The Python models on batches, with a stand-in for the Python backend's module."""

from __future__ import annotations

import io
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blipstream.config import ServerConfig
from blipstream.contract import ERROR_CODES
from blipstream.errors import (
    BlipstreamError,
    EngineError,
    InvalidImageError,
    InvalidRequestError,
    RequestTimeoutError,
    ServerBusyError,
)
from blipstream.instructions import instruction_inputs
from blipstream.preprocess import ImageTransform
from blipstream.triton.calls import Answer, TritonCall, forwarded_error, triton_error
from blipstream.triton.graph import QFormerModel
from blipstream.triton.model import ModelFolder
from blipstream.triton.preprocess import PreprocessModel
from tests.unit.triton.fakes import Request, Response, TritonError, backend_module, make_manifest


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend_module())


# --- graphs ----------------------------------------------------------------------------------------------------------

EMBEDS = (5, 6)
"""Shape of ``image_embeds`` in the fake manifest."""


class FakeEngine:
    """Soft tokens are the sums of the embeds and of the ids that the mask shows."""

    def __init__(self) -> None:
        self.batches: list[dict[str, np.ndarray]] = []
        self.error: EngineError | None = None

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.batches.append(inputs)
        if self.error is not None:
            raise self.error
        sums = inputs["image_embeds"].sum((1, 2))
        if "qformer_input_ids" in inputs:
            sums = sums + (inputs["qformer_input_ids"] * inputs["qformer_attention_mask"]).sum(1)
        return {"soft_tokens": np.broadcast_to(sums[:, None, None], (len(sums), 2, 4)).astype(np.float32)}

    def close(self) -> None:
        pass


class Served:
    """A ``qformer`` over a fake engine."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, instructed: bool) -> None:
        self.engine = FakeEngine()
        monkeypatch.setattr(ModelFolder, "load_engine", lambda _folder, _file: self.engine)
        make_manifest(instructed=instructed).dump(folder)
        self.model = QFormerModel()
        with warnings.catch_warnings():
            self.model.initialize(
                {"model_name": "qformer", "model_repository": str(folder / "qformer"), "model_version": "1"}
            )

    def ask(self, *requests: dict[str, np.ndarray]) -> list[Any]:
        """For each request: the first number of each of its rows, or its error's message."""
        responses = self.model.execute([Request(inputs) for inputs in requests])
        return [
            response.error().message()
            if response.has_error()
            else response.output_tensors()[0].as_numpy()[:, 0, 0].tolist()
            for response in responses
        ]


def embeds(*values: float) -> np.ndarray:
    """Embeds of one image a value, which is their sum."""
    array = np.zeros((len(values), *EMBEDS), np.float32)
    array[:, 0, 0] = values
    return array


def instructed(value: float, *ids: int) -> dict[str, np.ndarray]:
    return {"image_embeds": embeds(value), **instruction_inputs(ids)}


@pytest.fixture
def qformer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    return Served(tmp_path, monkeypatch, instructed=False)


@pytest.fixture
def instructed_qformer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    return Served(tmp_path, monkeypatch, instructed=True)


def test_each_request_gets_its_own_rows(qformer: Served) -> None:
    values = ((1.0,), (2.0, 3.0, 4.0), (5.0, 6.0))
    assert qformer.ask(*({"image_embeds": embeds(*rows)} for rows in values)) == [list(rows) for rows in values]
    assert [len(batch["image_embeds"]) for batch in qformer.engine.batches] == [6]


def test_numbers_that_are_not_finite_fail_their_request_and_leave_the_batch(qformer: Served) -> None:
    fault = "image_embeds must hold finite numbers, but some are NaN or infinite"
    found = qformer.ask(*({"image_embeds": embeds(value)} for value in (1, np.nan, 2, np.inf)))
    assert found == [[1.0], fault, [2.0], fault]
    assert [len(batch["image_embeds"]) for batch in qformer.engine.batches] == [2]


def test_a_batch_of_faults_runs_nothing(qformer: Served) -> None:
    (fault,) = qformer.ask({"image_embeds": embeds(np.nan)})
    assert "finite" in fault
    assert not qformer.engine.batches


def test_a_failing_engine_fails_every_sound_request(qformer: Served) -> None:
    qformer.engine.error = EngineError("broken")
    found = qformer.ask(*({"image_embeds": embeds(value)} for value in (1, np.nan, 2)))
    assert [found[0], found[2]] == ["broken", "broken"]
    assert "finite" in found[1]


def test_instructions_of_unequal_lengths_share_a_batch(instructed_qformer: Served) -> None:
    requests = [instructed(100, 1, 2, 3), instructed(200, 4), instructed(300), instructed(400, *range(9))]
    assert instructed_qformer.ask(*requests) == [[106.0], [204.0], [300.0], [436.0]]
    (batch,) = instructed_qformer.engine.batches
    assert batch["qformer_input_ids"][1].tolist() == [4, 7, 7, 7, 7, 7, 7, 7, 7]
    assert batch["qformer_attention_mask"].sum(1).tolist() == [3, 1, 0, 9]


def test_a_bad_instruction_fails_its_own_request_alone(instructed_qformer: Served) -> None:
    short = {**instructed(5, 1, 2), "qformer_attention_mask": np.ones((1, 1), np.int64)}
    found = instructed_qformer.ask(
        instructed(1, 1),
        instructed(2, 50),
        instructed(3, 1, 2),
        instructed(4, *range(10)),
        short,
        instructed(np.inf, 1),
    )
    assert (found[0], found[2]) == ([2.0], [6.0])
    assert "qformer_input_ids must hold numbers from 0 to 49, but one of them is 50" in found[1]
    assert "qformer_input_ids must hold 1 to 9 ids, but it holds 10" in found[3]
    assert "must have one shape" in found[4]
    assert "image_embeds must hold finite numbers" in found[5]
    assert [len(batch["image_embeds"]) for batch in instructed_qformer.engine.batches] == [2]


# --- preprocess ------------------------------------------------------------------------------------------------------


@pytest.fixture
def preprocess(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PreprocessModel]:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # the model sets it for its process
    for name, value in ServerConfig(max_image_pixels=10_000).to_environment().items():
        monkeypatch.setenv(name, value)
    make_manifest().dump(tmp_path)
    model = PreprocessModel()
    arguments = {"model_name": "preprocess", "model_repository": str(tmp_path / "preprocess"), "model_version": "1"}
    with warnings.catch_warnings():
        model.initialize(arguments)
        yield model
    model.finalize()


def png(colour: str, size: tuple[int, int] = (20, 10)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def image_request(*files: bytes) -> Request:
    return Request({"image": np.array([[file] for file in files], np.object_)})


def test_bad_images_fail_their_own_requests_alone(preprocess: PreprocessModel) -> None:
    files = [png("red"), b"not an image", png("blue"), png("lime")[:45], b"", png("red", (200, 200))]
    responses = preprocess.execute([image_request(file) for file in files])
    transform = ImageTransform(make_manifest().image)
    for index in (0, 2):
        pixels = responses[index].output_tensors()[0].as_numpy()
        np.testing.assert_array_equal(pixels[0], transform.decode(files[index]))
    faults = ("no known format", "truncated", "is empty", "40000 pixels")
    for index, fault in zip((1, 3, 4, 5), faults, strict=True):
        error = responses[index].error()
        assert error.code() == TritonError.INVALID_ARG
        assert fault in error.message()


def test_several_images_in_one_request(preprocess: PreprocessModel) -> None:
    (response,) = preprocess.execute([image_request(png("red"), png("blue"))])
    pixels = response.output_tensors()[0].as_numpy()
    assert pixels.shape == (2, 3, 8, 8)
    assert not np.array_equal(pixels[0], pixels[1])
    (response,) = preprocess.execute([image_request(png("red"), b"?")])
    assert response.has_error()


def test_large_jpegs_are_reduced_if_the_server_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    buffer = io.BytesIO()
    Image.effect_mandelbrot((200, 160), (-2, -1, 1, 1), 50).save(buffer, "JPEG")
    make_manifest().dump(tmp_path)
    arguments = {"model_name": "preprocess", "model_repository": str(tmp_path / "preprocess"), "model_version": "1"}
    found = []
    for oversampling in (0, 2):
        monkeypatch.setenv("BLIPSTREAM_JPEG_OVERSAMPLING", str(oversampling))
        with warnings.catch_warnings():
            model = PreprocessModel()
            model.initialize(arguments)
            (response,) = model.execute([image_request(buffer.getvalue())])
        found.append(response.output_tensors()[0].as_numpy()[0])
        np.testing.assert_array_equal(
            found[-1], ImageTransform(make_manifest().image, oversampling).decode(buffer.getvalue())
        )
        model.finalize()
    assert not np.array_equal(*found)


# --- calls -----------------------------------------------------------------------------------------------------------

ANSWER = Answer("a cat", "eos", 7, 3, (5, 6, 2))


def test_a_call_is_read() -> None:
    request = Request({"max_tokens": np.array([[3]], np.int32)}, timeout=1_500_000, parameters={"blipstream_call": "x"})
    call = TritonCall(request)
    assert (call.request_id, call.timeout, call.name) == ("request-7", 1.5, "x")
    assert call.inputs()["max_tokens"].tolist() == [[3]]
    assert TritonCall(Request({}, parameters={"timeout": 250_000})).timeout == 0.25
    assert TritonCall(Request({}, parameters={"timeout": "soon"})).timeout == 0.0
    assert TritonCall(Request({})).name == ""


def test_an_answer_becomes_tensors() -> None:
    request = Request({})
    TritonCall(request).send(ANSWER, final=True)
    ((response, flags),) = request.sender.sent
    assert isinstance(response, Response)
    assert flags == 1
    values = {tensor.name(): tensor.as_numpy().tolist() for tensor in response.output_tensors()}
    assert values == {
        "text_output": [[b"a cat"]],
        "finish_reason": [[b"eos"]],
        "num_input_tokens": [[7]],
        "num_output_tokens": [[3]],
        "output_ids": [[[5, 6, 2]]],
        "sequence_index": [[0]],
    }


def test_nothing_is_asked_after_the_final_response() -> None:
    request = Request({})
    call = TritonCall(request)
    assert call.is_cancelled()
    call.send(ANSWER, final=False)
    assert call.is_cancelled()
    call.fail(EngineError("broken"))
    assert not call.is_cancelled()
    assert request.questions == 2


def test_a_request_is_let_go_with_its_final_response() -> None:
    request = Request({"text_input": np.array([[b"x"]], np.object_)})
    alive = weakref.ref(request)
    call = TritonCall(request)
    del request
    call.send(ANSWER, final=False)
    assert alive() is not None
    assert set(call.inputs()) == {"text_input"}
    call.fail(EngineError("broken"))
    assert alive() is None
    assert call.inputs() == {}


def test_the_final_response_waits_for_a_question_under_way() -> None:
    request = Request({})
    call = TritonCall(request)
    asked, answer = threading.Event(), threading.Event()

    def is_cancelled() -> bool:
        asked.set()
        assert answer.wait(60)
        assert not request.sender.sent
        return False

    request.is_cancelled = is_cancelled  # type: ignore[method-assign]
    question = threading.Thread(target=call.is_cancelled)
    question.start()
    asked.wait(60)
    final = threading.Thread(target=call.send, args=(ANSWER,), kwargs={"final": True})
    final.start()
    answer.set()
    question.join(60)
    final.join(60)
    assert len(request.sender.sent) == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequestError("x"), TritonError.INVALID_ARG),
        (InvalidImageError("x"), TritonError.INVALID_ARG),
        (ServerBusyError("x"), TritonError.UNAVAILABLE),
        (RequestTimeoutError("x"), TritonError.UNAVAILABLE),
        (EngineError("x"), TritonError.INTERNAL),
    ],
)
def test_errors_have_codes(error: BlipstreamError, code: int) -> None:
    assert triton_error(error).code() == code
    assert triton_error(error).message() == "x"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InvalidRequestError("x"), "INVALID_ARGUMENT: x"),
        (ServerBusyError("x"), "UNAVAILABLE: x"),
        (EngineError("x"), "INTERNAL: x"),
    ],
)
def test_the_message_of_a_failed_request_begins_with_its_code(error: BlipstreamError, message: str) -> None:
    request = Request({})
    TritonCall(request).fail(error)
    ((response, _),) = request.sender.sent
    assert response.error().message() == message
    assert message.partition(": ")[0] in ERROR_CODES


def test_an_unforeseen_error_says_so() -> None:
    assert triton_error(KeyError("x")).message() == "an internal error occurred: KeyError('x')"


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("INVALID_ARGUMENT: why: because", TritonError.INVALID_ARG),
        ("UNAVAILABLE: busy", TritonError.UNAVAILABLE),
        ("INTERNAL: broken", TritonError.INTERNAL),
        ("words of Triton", TritonError.UNKNOWN),
    ],
)
def test_a_forwarded_error_gets_its_code_back(message: str, code: int) -> None:
    error = forwarded_error(TritonError(message, TritonError.UNKNOWN))
    assert (error.code(), error.message()) == (code, message)
