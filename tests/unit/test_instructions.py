"""Instructions: encoded, padded and checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from blipstream.errors import BundleError, InvalidRequestError, PromptTooLongError
from blipstream.instructions import InstructionEncoder, check_instruction, instruction_inputs, pad_instructions
from blipstream.manifest import InstructionSection
from tests.unit.decoding.fakes import byte_tokenizer
from tests.unit.triton.fakes import make_manifest

SECTION = InstructionSection(vocab_size=50, max_tokens=4, pad_token_id=7)


def inputs(ids: list[list[int]], mask: list[list[int]]) -> dict[str, np.ndarray]:
    return {"qformer_input_ids": np.array(ids), "qformer_attention_mask": np.array(mask)}


def test_a_text_that_the_qformer_cannot_hold_is_refused() -> None:
    encoder = InstructionEncoder(byte_tokenizer(), SECTION)
    assert encoder.encode("abcd") == (97, 98, 99, 100)
    with pytest.raises(
        PromptTooLongError, match="has 5 tokens for the Q-Former, which reads an instruction of at most 4"
    ):
        encoder.encode("abcde")


def test_the_encoder_of_a_bundle(tmp_path: Path) -> None:
    assert InstructionEncoder.load(tmp_path, make_manifest()) is None
    with pytest.raises(BundleError, match=r"there is no tokenizer at .*qformer_tokenizer.json"):
        InstructionEncoder.load(tmp_path, make_manifest(instructed=True))
    byte_tokenizer()._backend.save(str(tmp_path / "qformer_tokenizer.json"))
    encoder = InstructionEncoder.load(tmp_path, make_manifest(instructed=True))
    assert encoder is not None
    assert encoder.encode("ab") == (97, 98)


def test_instructions_are_padded_to_the_longest() -> None:
    batch = pad_instructions(
        [instruction_inputs((5, 6)), inputs([[1, 2, 3], [4, 0, 0]], [[1, 1, 1], [1, 0, 0]]), instruction_inputs(())],
        SECTION,
    )
    assert batch["qformer_input_ids"].tolist() == [[5, 6, 7], [1, 2, 3], [4, 0, 0], [0, 7, 7]]
    assert batch["qformer_attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}


@pytest.mark.parametrize("ids", [(), (0,), (49, 1, 2, 3)])
def test_what_an_encoder_gives_is_sound(ids: tuple[int, ...]) -> None:
    check_instruction(instruction_inputs(ids), SECTION)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (inputs([[1, 2]], [[1]]), InvalidRequestError, r"must have one shape, but they have \(1, 2\) and \(1, 1\)"),
        (inputs([[1] * 5], [[1] * 5]), PromptTooLongError, "qformer_input_ids must hold 1 to 4 ids, but it holds 5"),
        (inputs([[]], [[]]), InvalidRequestError, "qformer_input_ids must hold 1 to 4 ids, but it holds 0"),
        (inputs([[1, 50]], [[1, 1]]), InvalidRequestError, "must hold numbers from 0 to 49, but one of them is 50"),
        (inputs([[1, -1]], [[1, 1]]), InvalidRequestError, "must hold numbers from 0 to 49, but one of them is -1"),
        (inputs([[1, 2]], [[1, 2]]), InvalidRequestError, "qformer_attention_mask must hold numbers from 0 to 1, but"),
    ],
)
def test_what_the_qformer_cannot_read(given: dict[str, np.ndarray], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        check_instruction(given, SECTION)
    assert type(raised.value) is error
