"""Instructions as the Q-Former of InstructBLIP reads them: encoded, checked and padded to one length.

The Q-Former has a tokenizer of its own (BERT's). Servers, exporter and tests use this module, so that an instruction
means the same ids everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from blipstream.contract import QFORMER_ATTENTION_MASK, QFORMER_INPUT_IDS, QFORMER_TOKENIZER_FILE
from blipstream.decoding.text import Tokenizer
from blipstream.errors import InvalidRequestError, PromptTooLongError
from blipstream.manifest import InstructionSection, Manifest

Array = npt.NDArray[Any]

_IDS, _MASK = QFORMER_INPUT_IDS.name, QFORMER_ATTENTION_MASK.name


class InstructionEncoder:
    """From a request's text to the ids that the Q-Former reads. Safe to use from several threads.

    Args:
        tokenizer: the Q-Former's.
        section: what the Q-Former reads, from the manifest.
    """

    def __init__(self, tokenizer: Tokenizer, section: InstructionSection) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = section.max_tokens

    @classmethod
    def load(cls, folder: Path, manifest: Manifest) -> InstructionEncoder | None:
        """Read the tokenizer in the version folder of ``blip2``; None where the Q-Former reads no instructions.

        Raises:
            BundleError: there is no tokenizer, or it cannot be read.
        """
        section = manifest.qformer.instruction
        return None if section is None else cls(Tokenizer.load(folder / QFORMER_TOKENIZER_FILE), section)

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of an instruction, special tokens included; those of an empty one are what frames a text.

        Raises:
            PromptTooLongError: more ids than the Q-Former has positions.
        """
        ids = self._tokenizer.encode(text)
        if len(ids) > self._max_tokens:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens for the Q-Former, which reads an instruction of at most "
                f"{self._max_tokens}"
            )
        return ids


def instruction_inputs(ids: Sequence[int]) -> dict[str, Array]:
    """One instruction as inputs of the Q-Former by name, (1, S) int64 each."""
    if not ids:  # a tensor without elements does not travel: one id that the mask hides
        return {_IDS: np.zeros((1, 1), np.int64), _MASK: np.zeros((1, 1), np.int64)}
    return {_IDS: np.array([ids], np.int64), _MASK: np.ones((1, len(ids)), np.int64)}


def pad_instructions(instructions: Sequence[Mapping[str, Array]], section: InstructionSection) -> dict[str, Array]:
    """Instructions (b_i, S_i) as one batch (B, S), padded on the right to the longest and masked there."""
    longest = max(inputs[_IDS].shape[1] for inputs in instructions)
    padding = {_IDS: section.pad_token_id, _MASK: 0}
    return {
        name: np.concatenate([_widen(inputs[name], longest, value) for inputs in instructions])
        for name, value in padding.items()
    }


def check_instruction(inputs: Mapping[str, Array], section: InstructionSection) -> None:
    """See that the Q-Former can read an instruction, given as its inputs (b, S) by name.

    Raises:
        InvalidRequestError: ids and mask differ in shape, or hold what is no id and no mask.
        PromptTooLongError: more ids than the Q-Former has positions.
    """
    ids, mask = inputs[_IDS], inputs[_MASK]
    if ids.shape != mask.shape:
        raise InvalidRequestError(f"{_IDS} and {_MASK} must have one shape, but they have {ids.shape} and {mask.shape}")
    if not 1 <= ids.shape[1] <= section.max_tokens:
        error = PromptTooLongError if ids.shape[1] else InvalidRequestError
        raise error(f"{_IDS} must hold 1 to {section.max_tokens} ids, but it holds {ids.shape[1]}")
    for name, values, largest in ((_IDS, ids, section.vocab_size - 1), (_MASK, mask, 1)):
        if values.min() < 0 or values.max() > largest:
            wrong = values[(values < 0) | (values > largest)][0]
            raise InvalidRequestError(f"{name} must hold numbers from 0 to {largest}, but one of them is {wrong}")


def _widen(rows: Array, width: int, value: int) -> Array:
    return np.pad(rows, ((0, 0), (0, width - rows.shape[1])), constant_values=value)
