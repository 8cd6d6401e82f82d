"""The Python models on batches, with a stand-in for the Python backend's module."""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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
from blipstream.triton.calls import Answer, TritonCall, error_of, forwarded_error, triton_error
from blipstream.triton.graph import QFormerModel
from blipstream.triton.model import ModelFolder
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
    fault = "INVALID_ARGUMENT: image_embeds must hold finite numbers, but some are NaN or infinite"
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
    assert [found[0], found[2]] == ["INTERNAL: broken", "INTERNAL: broken"]
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
    ("error", "code", "name"),
    [
        (InvalidRequestError("x"), TritonError.INVALID_ARG, "INVALID_ARGUMENT"),
        (InvalidImageError("x"), TritonError.INVALID_ARG, "INVALID_ARGUMENT"),
        (ServerBusyError("x"), TritonError.UNAVAILABLE, "UNAVAILABLE"),
        (RequestTimeoutError("x"), TritonError.UNAVAILABLE, "UNAVAILABLE"),
        (EngineError("x"), TritonError.INTERNAL, "INTERNAL"),
    ],
)
def test_errors_have_codes_with_which_their_messages_begin(error: BlipstreamError, code: int, name: str) -> None:
    request = Request({})
    TritonCall(request).fail(error)
    for found in (triton_error(error), request.sender.sent[0][0].error()):  # type: ignore[union-attr]
        assert (found.code(), found.message()) == (code, f"{name}: x")
    assert name in ERROR_CODES


@pytest.mark.parametrize(
    ("message", "kind", "said"),
    [
        (
            "in ensemble 'image_features', INVALID_ARGUMENT: the image is b'INTERNAL: '",
            InvalidRequestError,
            "the image",
        ),
        ("UNAVAILABLE: busy", ServerBusyError, "busy"),
        ("in ensemble 'x', INTERNAL: broken", EngineError, "broken"),
        ("words of Triton", EngineError, "words of Triton"),
    ],
)
def test_the_error_of_another_model_is_of_the_kind_that_it_tells(
    message: str, kind: type[BlipstreamError], said: str
) -> None:
    assert type(error_of(message)) is kind
    assert str(error_of(message)).startswith(said)


def test_an_unforeseen_error_says_so() -> None:
    assert triton_error(KeyError("x")).message() == "INTERNAL: an internal error occurred: KeyError('x')"


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
