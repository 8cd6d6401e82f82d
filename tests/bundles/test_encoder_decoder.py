"""The engine of an encoder-decoder against transformers, which keeps no cache here: rows, caches, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blipstream.contract import DECODER_FILE, ENCODER_FILE
from blipstream.decoding.request import Prompt
from blipstream.engines import CachedDecoder, EncoderDecoder, Engine, create_engine, load_decoder
from blipstream.errors import EngineError
from blipstream.manifest import DecoderSection
from tests.support.checkpoints import make_blip2
from tests.unit.engines.graphs import SIZES, TinyDecoder

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

MAX_TOKENS = 20
VOCAB_SIZE = 62


@pytest.fixture(scope="module")
def model() -> Any:
    return make_blip2("t5", VOCAB_SIZE, 61, seed=2, text={"num_layers": 3, "num_decoder_layers": 2}).language_model


@pytest.fixture(scope="module")
def sizes(model: Any) -> DecoderSection:
    from blipstream_export.models import t5

    return t5.decoder_section(model.config, max_sequences=4, max_tokens=MAX_TOKENS)


@pytest.fixture(scope="module")
def folder(model: Any, sizes: DecoderSection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from blipstream_export.graphs import export_graph
    from blipstream_export.models import t5

    folder = tmp_path_factory.mktemp("t5")
    for graph in t5.graphs(model, sizes):
        export_graph(graph.module, graph.inputs, folder / graph.file, engine="onnxruntime")
    return folder


def engine_of(path: Path) -> Engine:
    return create_engine("onnxruntime", path, threads=1)


@pytest.fixture
def decoder(folder: Path, sizes: DecoderSection) -> EncoderDecoder:
    decoder = load_decoder(sizes, lambda file: engine_of(folder / file))
    assert isinstance(decoder, EncoderDecoder)
    return decoder


def random_prompt(num_soft: int, num_text: int, seed: int) -> Prompt:
    rng = np.random.default_rng(seed)
    soft = rng.normal(0, 1, (num_soft, 48)).astype(np.float32)
    return Prompt(soft, tuple(int(token) for token in rng.integers(0, VOCAB_SIZE - 1, num_text)))


def reference(model: Any, prompt: Prompt, generated: list[int]) -> np.ndarray:
    """Logits (V,) after the prompt and the generated tokens, computed from nothing each time."""
    with torch.no_grad():
        embeds = torch.cat([torch.from_numpy(prompt.soft_tokens), model.shared(torch.tensor(prompt.token_ids))])
        ids = torch.tensor([[0, *generated]])
        return model(inputs_embeds=embeds[None], decoder_input_ids=ids, use_cache=False).logits[0, -1].numpy()


class Rows:
    """Sequences in rows, advanced greedily, each compared with the reference after every call."""

    def __init__(self, decoder: EncoderDecoder, model: Any) -> None:
        self.decoder, self.model = decoder, model
        self.rows: list[tuple[Prompt, list[int]]] = []

    def prefill(self, *prompts: Prompt) -> None:
        first = len(self.rows)
        self.rows += [(prompt, []) for prompt in prompts]
        self._check(self.decoder.prefill(first, prompts), first)

    def step(self) -> None:
        lengths = [len(generated) for _, generated in self.rows]  # the start token, and all but the newest
        last = [generated[-1] for _, generated in self.rows]
        self._check(self.decoder.decode(np.array(last), np.array(lengths)), 0)

    def remove(self, row: int) -> None:
        last = len(self.rows) - 1
        if row != last:
            self.decoder.move_row(last, row, len(self.rows[last][1]))
            self.rows[row] = self.rows[last]
        self.rows.pop()

    def _check(self, logits: np.ndarray, first: int) -> None:
        assert logits.shape == (len(self.rows) - first, VOCAB_SIZE)
        for got, (prompt, generated) in zip(logits, self.rows[first:], strict=True):
            expected = reference(self.model, prompt, generated)
            np.testing.assert_allclose(got, expected, rtol=0, atol=5e-5 * np.abs(expected).max())
            generated.append(int(got.argmax()))


def test_rows_of_different_lengths_match_the_reference_as_they_come_and_go(decoder, model):
    rows = Rows(decoder, model)
    rows.prefill(random_prompt(3, 1, seed=1), random_prompt(3, 6, seed=2))
    rows.step()
    rows.step()
    rows.prefill(random_prompt(3, 15, seed=3))
    rows.step()
    rows.remove(0)
    rows.step()
    rows.prefill(random_prompt(0, 1, seed=4), random_prompt(5, 3, seed=5))
    rows.step()
    rows.remove(3)
    rows.remove(1)
    rows.step()


def test_a_row_can_be_filled_to_its_last_token(decoder, model, sizes):
    rows = Rows(decoder, model)
    rows.prefill(random_prompt(3, MAX_TOKENS - 3, seed=6), random_prompt(1, 1, seed=7))
    for _ in range(MAX_TOKENS):
        rows.step()  # the last leaves a row of the start token and an answer of MAX_TOKENS
    assert decoder.max_tokens == sizes.max_tokens == MAX_TOKENS + 1
    assert decoder.max_prompt_tokens == MAX_TOKENS


def test_it_says_what_the_loop_asks(decoder):
    assert (decoder.decoder_start_token_id, decoder.max_sequences, decoder.vocab_size) == (0, 4, VOCAB_SIZE)


def test_prefill_leaves_running_rows_and_rows_behind_untouched(decoder):
    decoder.prefill(0, [random_prompt(3, 2, seed=seed) for seed in range(4)])
    before = [[tensor.copy() for tensor in cache.tensors] for cache in (decoder._cache, decoder._cross_cache)]
    decoder.prefill(1, [random_prompt(3, 8, seed=9), random_prompt(3, 4, seed=10)])
    for cache, old in zip((decoder._cache, decoder._cross_cache), before, strict=True):
        for left, right in zip(old, cache.tensors, strict=True):
            np.testing.assert_array_equal(left[[0, 3]], right[[0, 3]])
        changed = [(left[1:3] != right[1:3]).any() for left, right in zip(old, cache.tensors, strict=True)]
        assert all(changed[2:])  # the first layer of the decoder sees no more than the start token


def test_a_step_writes_nothing_into_the_cross_attentions_cache(decoder):
    decoder.prefill(0, [random_prompt(3, 2, seed=1), random_prompt(3, 9, seed=2)])
    before = [tensor.copy() for tensor in decoder._cross_cache.tensors]
    decoder.decode(np.array([5, 6]), np.array([1, 1]))
    for old, new in zip(before, decoder._cross_cache.tensors, strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_step_reads_no_more_of_a_row_than_its_prompt(decoder, model):
    prompts = [random_prompt(2, 2, seed=1), random_prompt(3, 9, seed=2)]
    decoder.prefill(0, prompts)
    for tensor in decoder._cross_cache.tensors:
        tensor[0, :, 4:], tensor[1, :, 12:] = np.nan, np.nan
    logits = decoder.decode(np.array([5, 6]), np.array([1, 1]))
    for got, prompt, token in zip(logits, prompts, (5, 6), strict=True):
        np.testing.assert_allclose(got, reference(model, prompt, [token]), atol=1e-3)


def test_moving_a_row_copies_no_more_than_its_tokens(decoder):
    decoder.prefill(0, [random_prompt(2, seed, seed=seed) for seed in (1, 2, 3, 5)])  # the last prompt has 7 tokens
    for cache in (decoder._cache, decoder._cross_cache):
        for tensor in cache.tensors:
            tensor[...] = np.arange(4)[:, None, None, None]
    decoder.move_row(3, 1, 4)
    for cache, length in ((decoder._cache, 4), (decoder._cross_cache, 7)):
        for tensor in cache.tensors:
            assert (tensor[1, :, :length] == 3).all()
            assert (tensor[1, :, length:] == 1).all()


def test_nan_in_one_prompt_stays_in_its_row(decoder, model):
    healthy = random_prompt(3, 4, seed=1)
    broken = Prompt(np.full((3, 48), np.nan, np.float32), (1, 2))
    logits = decoder.prefill(0, [broken, healthy])
    assert np.isnan(logits[0]).all()
    np.testing.assert_allclose(logits[1], reference(model, healthy, []), atol=1e-3)
    logits = decoder.decode(np.array([5, 6]), np.array([1, 1]))
    np.testing.assert_allclose(logits[1], reference(model, healthy, [6]), atol=1e-3)
    decoder.prefill(0, [healthy])  # a row that held NaN is as good as new
    np.testing.assert_allclose(
        decoder.decode(np.array([6]), np.array([1]))[0], reference(model, healthy, [6]), atol=1e-3
    )


def test_graphs_that_do_not_fit_are_refused(folder, sizes, tmp_path):
    encoder, stepping = engine_of(folder / ENCODER_FILE), engine_of(folder / DECODER_FILE)
    deeper = sizes.model_copy(update={"num_layers": 3})
    with pytest.raises(EngineError, match=r"is not a decoder of 3 layers: it lacks past_cross_key.2.* has nothing"):
        EncoderDecoder(encoder, stepping, deeper)
    with pytest.raises(EngineError, match=r"decoder.onnx is not an encoder for a decoder of 2 layers: it lacks cross_"):
        EncoderDecoder(stepping, stepping, sizes)
    with pytest.raises(EngineError, match="was given for a language model of kind opt, without encoder"):
        EncoderDecoder(encoder, stepping, SIZES)
    alone = engine_of(TinyDecoder.random().save(tmp_path / "decoder.onnx"))
    with pytest.raises(EngineError, match="is not a decoder of 2 layers: it lacks cross_seqlens_k, past_cross_key"):
        EncoderDecoder(encoder, alone, sizes)
    with pytest.raises(EngineError, match="is not a decoder of 2 layers: it lacks last_index, soft_tokens"):
        CachedDecoder(stepping, sizes)


def test_a_missing_graph_is_named(folder, sizes, tmp_path):
    with pytest.raises(EngineError, match=r"there is no ONNX graph at .*encoder.onnx"):
        load_decoder(sizes, lambda file: engine_of(tmp_path / file))


def test_a_closed_decoder_says_so(decoder):
    decoder.close()
    with pytest.raises(EngineError, match=r"encoder.onnx: the engine is closed"):
        decoder.prefill(0, [random_prompt(1, 1, seed=1)])
    with pytest.raises(EngineError, match=r"decoder.onnx: the engine is closed"):
        decoder.decode(np.array([1]), np.array([3]))
