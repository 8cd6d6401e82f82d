"""Each variant of OPT and LLaMA: logits of its graph, and of further questions about an image that it has read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from blipstream.decoding.request import Prompt
from blipstream.engines import RowDecoder
from blipstream.engines import decoder as decoders
from tests.export.language_models import CASES, Exported, Exporter, decode_along, expected_logits, make_prompts

MANY = 1 << 20


@pytest.fixture
def _large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models here count as large ones."""
    monkeypatch.setattr(decoders, "LARGE", 1)


def loaded(exported: Exported, prefix_bytes: int = MANY) -> tuple[Any, RowDecoder]:
    return exported.model, exported.load(prefix_bytes)


def about(image: Prompt, *texts: Sequence[int]) -> list[Prompt]:
    return [Prompt(image.soft_tokens.copy(), tuple(text)) for text in texts]


def hits(decoder: RowDecoder) -> float:
    return decoder.prefix_gauges()["prefix_cache_hits_total"]


@torch.no_grad()
@pytest.mark.parametrize(("language", "name"), [case for case in CASES if case[0] != "t5"])
def test_variants_have_the_logits_of_transformers(language: str, name: str, exported: Exporter) -> None:
    """Rows that are prefilled at different times and stepped together; then questions about an image that is known."""
    model, decoder = loaded(exported(language, name), 0)
    decode_along(decoder, model)
    decoder.close()
    decoder = exported(language, name).load(MANY)
    image, other = make_prompts(model, [(4, 1), (4, 1)])
    prompts = [*about(image, [3, 9, 11], [7]), *about(other, [5, 6])]
    for row, prompt in enumerate(prompts):
        check(decoder.prefill(row, [prompt])[0], model, prompt)
    assert hits(decoder) == 1
    tokens, lengths = [2, 4, 8], [prompt.num_tokens for prompt in prompts]
    for prompt, token, logits in zip(prompts, tokens, decoder.decode(np.array(tokens), np.array(lengths)), strict=True):
        check(logits, model, prompt, [token])
    decoder.move_row(2, 0, lengths[2] + 1)
    (again,) = about(image, list(range(10)))
    check(decoder.prefill(2, [again])[0], model, again)
    assert hits(decoder) == 2
    decoder.close()


def check(logits: np.ndarray, model: Any, prompt: Prompt, generated: Sequence[int] = ()) -> None:
    expected = expected_logits(model, prompt, generated)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=5e-5 * np.abs(expected).max())


@torch.no_grad()
@pytest.mark.usefixtures("_large")
@pytest.mark.parametrize("language", ["opt", "llama"])
def test_prompts_that_come_together_share_what_is_known(language: str, exported: Exporter) -> None:
    """Those of one image read its soft tokens once, wherever they stand; further ones, of two images, not at all."""
    model, decoder = loaded(exported(language, "plain"))
    image, other = make_prompts(model, [(4, 1), (3, 1)])
    together = [*about(image, [3, 9, 11]), *about(image, [8, 8]), *about(other, [5])]
    check_all(decoder, model, together)
    assert hits(decoder) == 1
    check_all(decoder, model, [*about(other, [1, 2]), *about(image, [1, 2])])
    assert hits(decoder) == 3
    (third,) = make_prompts(model, [(2, 4)])
    check_all(decoder, model, [*about(image, [6]), third, *about(other, [5, 6, 7])])
    assert hits(decoder) == 5
    decoder.close()


@torch.no_grad()
def test_a_small_model_reads_prompts_that_come_together_together(exported: Exporter) -> None:
    """And knows them afterwards, one by one."""
    model, decoder = loaded(exported("opt", "plain"))
    image, other = make_prompts(model, [(4, 1), (3, 1)])
    for _ in range(2):
        check_all(decoder, model, [*about(image, [3, 9, 11]), *about(other, [5]), *about(image, [8, 8])])
    assert hits(decoder) == 0
    for prompt in (*about(other, [1, 2]), *about(image, [1, 2])):
        check(decoder.prefill(1, [prompt])[0], model, prompt)
    assert hits(decoder) == 2
    decoder.close()


@torch.no_grad()
@pytest.mark.usefixtures("_large")
def test_what_is_dropped_in_between_is_read_again(exported: Exporter) -> None:
    """With room for one image, the second's soft tokens drop the first's, which another prompt was to go on behind."""
    model, decoder = loaded(exported("opt", "plain"))
    image, other = make_prompts(model, [(4, 1), (4, 1)])
    decoder.prefill(0, [image])
    size = int(decoder.prefix_gauges()["prefix_cache_bytes"])
    decoder.close()
    for budget, found in ((size, 0), (size - 1, 0), (2 * size, 1)):
        decoder = exported("opt", "plain").load(budget)
        check_all(decoder, model, [*about(image, [3]), *about(other, [5]), *about(image, [8, 8])])
        assert hits(decoder) == found
        decoder.close()


def check_all(decoder: RowDecoder, model: Any, prompts: Sequence[Prompt]) -> None:
    """The logits of prompts that come together, and of the step behind them."""
    for prompt, logits in zip(prompts, decoder.prefill(0, prompts), strict=True):
        check(logits, model, prompt)
    tokens, lengths = np.arange(2, 2 + len(prompts)), np.array([prompt.num_tokens for prompt in prompts])
    for prompt, token, logits in zip(prompts, tokens.tolist(), decoder.decode(tokens, lengths), strict=True):
        check(logits, model, prompt, [token])


@torch.no_grad()
def test_a_budget_is_kept_and_what_is_used_stays_longest(exported: Exporter) -> None:
    model, decoder = loaded(exported("opt", "plain"))
    first, second, third = make_prompts(model, [(4, 1), (4, 1), (4, 1)])
    decoder.prefill(0, [first])
    size = int(decoder.prefix_gauges()["prefix_cache_bytes"])
    decoder.close()
    decoder = exported("opt", "plain").load(2 * size)
    for prompt in (first, second, first, third):
        decoder.prefill(0, [prompt])
    assert hits(decoder) == 1
    assert decoder.prefix_gauges()["prefix_cache_bytes"] == 2 * size
    decoder.prefill(0, [first])
    assert hits(decoder) == 2
    decoder.prefill(0, [second])  # it made room for the third
    assert hits(decoder) == 2
    decoder.close()


@torch.no_grad()
def test_without_a_budget_and_behind_an_encoder_nothing_is_kept(exported: Exporter) -> None:
    model, decoder = loaded(exported("opt", "plain"), 0)
    (image,) = make_prompts(model, [(4, 2)])
    for _ in range(2):
        check(decoder.prefill(0, [image])[0], model, image)
    assert decoder.prefix_gauges() == {}
    decoder.close()
    decoder = exported("t5", "gated, untied").load(MANY)
    assert decoder.prefix_gauges() == {}
    decoder.close()
