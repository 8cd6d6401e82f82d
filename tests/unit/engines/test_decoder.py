"""The cached decoder against a NumPy reference that keeps no cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from blipstream.decoding.request import Prompt
from blipstream.engines import CachedDecoder, create_engine
from blipstream.errors import EngineError
from tests.unit.engines.graphs import SIZES, TinyDecoder, random_prompt


@pytest.fixture(scope="module")
def model() -> TinyDecoder:
    return TinyDecoder.random()


@pytest.fixture
def decoder(model: TinyDecoder, tmp_path: Path) -> CachedDecoder:
    return CachedDecoder(create_engine("onnxruntime", model.save(tmp_path / "decoder.onnx"), threads=1), SIZES)


class Rows:
    """Sequences in rows, advanced greedily, each compared with the reference after every call."""

    def __init__(self, decoder: CachedDecoder, model: TinyDecoder) -> None:
        self.decoder, self.model = decoder, model
        self.rows: list[tuple[Prompt, list[int]]] = []

    def prefill(self, prompts: list[Prompt]) -> None:
        first = len(self.rows)
        self.rows += [(prompt, []) for prompt in prompts]
        self._check(self.decoder.prefill(first, prompts), first)

    def step(self) -> None:
        lengths = [prompt.num_tokens + len(generated) - 1 for prompt, generated in self.rows]
        last = [generated[-1] for _, generated in self.rows]
        self._check(self.decoder.decode(np.array(last), np.array(lengths)), 0)

    def remove(self, row: int) -> None:
        last = len(self.rows) - 1
        if row != last:
            prompt, generated = self.rows[last]
            self.decoder.move_row(last, row, prompt.num_tokens + len(generated) - 1)
            self.rows[row] = self.rows[last]
        self.rows.pop()

    def _check(self, logits: np.ndarray, first: int) -> None:
        assert logits.shape == (len(self.rows) - first, SIZES.vocab_size)
        for got, (prompt, generated) in zip(logits, self.rows[first:], strict=True):
            np.testing.assert_allclose(got, self.model.reference(prompt, generated), atol=2e-4)
            generated.append(int(got.argmax()))


def test_rows_of_different_lengths_match_the_reference_as_they_come_and_go(decoder, model):
    rows = Rows(decoder, model)
    rows.prefill([random_prompt(SIZES, 3, 1, seed=1), random_prompt(SIZES, 3, 6, seed=2)])
    rows.step()
    rows.prefill([random_prompt(SIZES, 3, 9, seed=3)])
    rows.step()
    rows.remove(0)
    rows.step()
    rows.prefill([random_prompt(SIZES, 0, 2, seed=4), random_prompt(SIZES, 5, 3, seed=5)])
    rows.step()
    rows.remove(3)
    rows.remove(1)
    rows.step()


def test_a_row_can_be_filled_to_its_last_token(decoder, model):
    rows = Rows(decoder, model)
    rows.prefill([random_prompt(SIZES, 3, SIZES.max_tokens - 5, seed=6), random_prompt(SIZES, 1, 1, seed=7)])
    rows.step()
    rows.step()  # the first row now holds max_tokens tokens


def test_prefill_leaves_running_rows_and_rows_behind_untouched(decoder, model):
    rows = Rows(decoder, model)
    rows.prefill([random_prompt(SIZES, 3, 2, seed=seed) for seed in range(4)])
    before = [tensor.copy() for tensor in decoder._cache.tensors]
    decoder.prefill(1, [random_prompt(SIZES, 3, 8, seed=9), random_prompt(SIZES, 3, 4, seed=10)])
    for old, new in zip(before, decoder._cache.tensors, strict=True):
        np.testing.assert_array_equal(old[[0, 3]], new[[0, 3]])
        assert (old[1:3] != new[1:3]).any()


def test_moving_a_row_copies_no_more_than_its_tokens(decoder):
    for tensor in decoder._cache.tensors:
        tensor[...] = np.arange(SIZES.max_sequences)[:, None, None, None]
    decoder.move_row(3, 1, 7)
    for tensor in decoder._cache.tensors:
        assert (tensor[1, :, :7] == 3).all()
        assert (tensor[1, :, 7:] == 1).all()


def test_nan_in_one_prompt_stays_in_its_row(decoder, model):
    healthy = random_prompt(SIZES, 3, 4, seed=1)
    broken = Prompt(np.full((3, SIZES.hidden_size), np.nan, np.float32), (1, 2))
    logits = decoder.prefill(0, [broken, healthy])
    assert np.isnan(logits[0]).all()
    np.testing.assert_allclose(logits[1], model.reference(healthy, []), atol=2e-4)
    logits = decoder.decode(np.array([5, 6]), np.array([5, 7]))
    np.testing.assert_allclose(logits[1], model.reference(healthy, [6]), atol=2e-4)
    decoder.prefill(0, [healthy])  # a row that held NaN is as good as new
    np.testing.assert_allclose(
        decoder.decode(np.array([6]), np.array([7]))[0], model.reference(healthy, [6]), atol=2e-4
    )


def test_cache_is_aligned(decoder):
    assert all(tensor.ctypes.data % 64 == 0 for tensor in decoder._cache.tensors)


def test_a_graph_that_is_no_decoder_of_these_sizes_is_refused(model, tmp_path):
    engine = create_engine("onnxruntime", model.save(tmp_path / "decoder.onnx"), threads=1)
    with pytest.raises(EngineError, match=r"decoder.onnx is not a decoder of 3 layers: it lacks past_key.2.* nothing"):
        CachedDecoder(engine, SIZES.model_copy(update={"num_layers": 3}))


def test_a_closed_decoder_says_so(decoder):
    decoder.close()
    with pytest.raises(EngineError, match=r"decoder.onnx: the engine is closed"):
        decoder.decode(np.array([1]), np.array([3]))
