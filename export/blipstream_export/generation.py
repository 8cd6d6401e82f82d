"""Prompt framing and defaults of ``generate``, as transformers computes them for this checkpoint.

``Blip2ForConditionalGeneration.generate`` hands over to the language model's own ``generate``, whose defaults come from
the text configuration; a ``generation_config.json`` beside the checkpoint is loaded by transformers 5 and not read.
Blipstream does the same, and says so where that file asks for something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from blipstream.errors import CheckpointError
from blipstream.manifest import GenerationSection

if TYPE_CHECKING:
    from blipstream_export.checkpoint import Checkpoint

DEFAULT_NEW_TOKENS = 20
"""New tokens that ``generate`` makes when nobody says how many."""

NEUTRAL: Mapping[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
}
"""Defaults of a generation configuration that a bundle cannot hold, with the values that change nothing."""

_UNHELD = {**NEUTRAL, "max_length": DEFAULT_NEW_TOKENS}

_HELD = ("max_new_tokens", "repetition_penalty", "eos_token_id")
_FILE = "generation_config.json"


def empty_prompt_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """What stands behind the soft tokens where there is no prompt: as ``generate`` puts it when it is given none.

    Where ``generate`` cannot go without a prompt (:func:`begin_token_id`), it is what the processor makes of an empty
    text.
    """
    begin = begin_token_id(checkpoint)
    if begin is None:
        return tuple(int(token) for token in checkpoint.processor.tokenizer("")["input_ids"])
    return (begin,)


def begin_token_id(checkpoint: Checkpoint) -> int | None:
    """The token that ``generate`` puts behind the soft tokens when it is given no prompt.

    None where it fails without one: with a Q-Former that reads instructions, and with a language model whose
    configuration has no ``bos_token_id``, as most of T5.
    """
    begin: int | None = getattr(checkpoint.config.text_config, "bos_token_id", None)
    return begin if is_token(begin) and not checkpoint.instructed else None


def generation_section(
    model: Any, checkpoint: Checkpoint, *, question_template: str | None = None
) -> GenerationSection:
    """The manifest's generation section; the template of questions is that of the family unless given.

    Raises:
        CheckpointError: an end token is outside the vocabulary.
    """
    defaults, text = model.language_model.generation_config, model.config.text_config
    eos = _as_tuple(defaults.eos_token_id)
    if any(not 0 <= token < text.vocab_size for token in eos):
        raise CheckpointError(
            f"eos_token_id = {defaults.eos_token_id} is outside the language model's vocabulary of "
            f"{text.vocab_size} tokens"
        )
    return GenerationSection(
        empty_prompt_ids=empty_prompt_ids(checkpoint),
        eos_token_ids=eos,
        pad_token_id=defaults.pad_token_id if is_token(defaults.pad_token_id) else None,
        image_token_id=checkpoint.placeholder_id,
        max_new_tokens=int(defaults.max_new_tokens or DEFAULT_NEW_TOKENS),
        question_template=question_template or checkpoint.family.image_side.question_template,
        repetition_penalty=float(1.0 if defaults.repetition_penalty is None else defaults.repetition_penalty),
    )


def generation_notes(model: Any, checkpoint: Checkpoint) -> list[str]:
    """One sentence for each default that is not in the checkpoint, or that the bundle does not carry."""
    used, beside = model.language_model.generation_config, model.generation_config
    notes = []
    if begin_token_id(checkpoint) is None and not checkpoint.instructed:
        notes.append(
            "the language model has no bos_token_id, without which generate cannot caption: here, a caption begins "
            f"with the tokens of an empty text, {list(empty_prompt_ids(checkpoint))}"
        )
    unheld = _differences(used, {name: (value, None) for name, value in _UNHELD.items()})
    if unheld:
        notes.append(
            f"the language model's defaults ask for {unheld}, which the bundle does not carry: requests that say "
            "nothing are decoded greedily"
        )
    everywhere = {name: (value, None) for name, value in _UNHELD.items()}
    everywhere |= {name: (getattr(used, name), None) for name in _HELD}
    ignored = _differences(beside, everywhere)
    if ignored:
        notes.append(
            f"{_FILE} asks for {ignored}, which the checkpoint's own generate does not read, and neither does the "
            "bundle"
        )
    return notes


def _differences(config: Any, neutral: Mapping[str, tuple[Any, ...]]) -> str:
    values = {name: getattr(config, name, None) for name in neutral}
    return ", ".join(f"{name} = {value}" for name, value in values.items() if value not in (*neutral[name], None))


def is_token(token: int | None) -> bool:
    """Whether an id of a configuration is one; old configurations write -1 for none."""
    return token is not None and token >= 0


def _as_tuple(token: int | list[int] | None) -> tuple[int, ...]:
    if token is None:
        return ()
    return tuple(token) if isinstance(token, list) else (int(token),)
