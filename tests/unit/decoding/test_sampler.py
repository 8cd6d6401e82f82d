"""The sampler against transformers' own logits processors, and what it promises besides."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blipstream.decoding.logits import DeviceLogits
from blipstream.decoding.request import SamplingParams
from blipstream.decoding.sampler import (
    BannedWords,
    Choice,
    TokenChooser,
    choose_tokens,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
    sampling_distribution,
    softmax,
)
from blipstream.errors import EngineError, InvalidRequestError

VOCAB_SIZE = 53
EOS = 7
TOKENS = st.integers(0, 3)


def chooser_of(prompt_ids=(), bad_words=(), eos=(EOS,), vocab_size=VOCAB_SIZE, **params):
    return TokenChooser(
        SamplingParams(**{"max_tokens": 100, **params}),
        prompt_ids=prompt_ids,
        eos_token_ids=eos,
        bad_words=bad_words,
        vocab_size=vocab_size,
    )


def random_logits(rows, seed=0, vocab_size=VOCAB_SIZE, ties=False):
    logits = np.random.default_rng(seed).normal(0, 3, (rows, vocab_size)).astype(np.float32)
    return np.round(logits) if ties else logits


def tokens_of(chooser, logits):
    """Tokens chosen from each row of the logits (T, V), one after the other."""
    return [choose_tokens(row[None], [chooser])[0].token_id for row in logits]


# --- greedy ----------------------------------------------------------------------------------------------------------


def test_greedy_takes_the_largest_logit_of_each_row():
    logits = random_logits(16)
    choices = choose_tokens(logits, [chooser_of() for _ in range(16)])
    assert [choice.token_id for choice in choices] == logits.argmax(1).tolist()
    assert all(choice.log_prob is None for choice in choices)


def test_greedy_breaks_ties_as_torch_does():
    torch = pytest.importorskip("torch")
    logits = random_logits(64, ties=True)
    assert (logits == logits.max(1, keepdims=True)).sum(1).max() > 1  # there are ties
    choices = choose_tokens(logits, [chooser_of() for _ in range(64)])
    assert [choice.token_id for choice in choices] == torch.from_numpy(logits).argmax(1).tolist()


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.0, "top_p": 0.9},
        {"top_k": 1, "temperature": 2.0},
        {"top_p": 0.0},
        {"top_p": 0.0, "top_k": 0},
    ],
)
def test_requests_that_are_greedy(params):
    logits = random_logits(20)
    assert tokens_of(chooser_of(**params), logits) == logits.argmax(1).tolist()


def test_the_logits_are_left_as_they_were():
    logits = random_logits(3)
    before = logits.copy()
    choosers = [
        chooser_of(prompt_ids=(1, 2), repetition_penalty=1.5, min_tokens=3, log_probs=True),
        chooser_of(temperature=0.5, top_k=5, top_p=0.5, seed=1),
        chooser_of(bad_words=[(int(logits[2].argmax()),)]),
    ]
    choose_tokens(logits, choosers)
    np.testing.assert_array_equal(logits, before)


# --- against transformers --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processors():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers.generation.logits_process")


def processed(processor, ids, scores):
    """What a processor of transformers makes of the scores (V,) after the ids."""
    import torch

    return processor(torch.tensor([ids]), torch.from_numpy(scores.copy())[None])[0].numpy()


@pytest.mark.parametrize("penalty", [0.5, 1.1, 1.5, 7.0])
def test_repetition_penalty(processors, penalty):
    for seed in range(20):
        scores = random_logits(1, seed)[0]
        ids = np.random.default_rng(seed).integers(0, VOCAB_SIZE, 12)
        expected = processed(processors.RepetitionPenaltyLogitsProcessor(penalty), ids.tolist(), scores)
        penalise_repetition(scores, np.unique(ids), penalty)
        np.testing.assert_array_equal(scores, expected)


def kept(warper, scores):
    return np.flatnonzero(np.isfinite(processed(warper, [0], scores))).tolist()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [1, 2, 5, 52, 53, 1000])
def test_top_k(processors, k, ties):
    for seed in range(20):
        scores = random_logits(1, seed, ties=ties)[0]
        ids, left = keep_top_k(np.arange(VOCAB_SIZE), scores, k)
        assert ids.tolist() == kept(processors.TopKLogitsWarper(k), scores)
        np.testing.assert_array_equal(left, scores[ids])


@pytest.fixture
def stable_sort(monkeypatch):
    """The warper's sort leaves the order of equals open; a stable one decides it."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "sort", functools.partial(torch.sort, stable=True))


@pytest.mark.usefixtures("stable_sort")
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p(processors, p, ties):
    for seed in range(40):
        scores = random_logits(1, seed, ties=ties)[0]
        ids, left = keep_top_p(np.arange(VOCAB_SIZE), scores, p)
        assert ids.tolist() == kept(processors.TopPLogitsWarper(p), scores)
        np.testing.assert_array_equal(left, scores[ids])


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_top_p_on_a_large_vocabulary(processors, scale):
    """Most tokens are never sorted; the result is that of sorting them all."""
    for seed in range(5):
        scores = random_logits(1, seed, vocab_size=20_000)[0] * np.float32(scale)
        ids, _ = keep_top_p(np.arange(20_000), scores, 0.9)
        expected = kept(processors.TopPLogitsWarper(0.9), scores)
        # Sums of 20,000 terms are rounded differently: the sets may differ by a few tokens right at the boundary.
        assert len(set(ids.tolist()) ^ set(expected)) <= 5
        boundary = sorted(scores[expected])[0]
        assert abs(scores[ids].min() - boundary) < 1e-3 * max(1.0, abs(boundary))


@pytest.mark.usefixtures("stable_sort")
@pytest.mark.parametrize(("vocab_size", "p"), [(VOCAB_SIZE, 1e-9), (VOCAB_SIZE, 0.3), (4, 0.5), (8, 0.25)])
def test_top_p_of_equals(processors, vocab_size, p):
    """Among them sums that meet the boundary exactly."""
    scores = np.zeros(vocab_size, np.float32)
    ids, _ = keep_top_p(np.arange(vocab_size), scores, p)
    assert ids.tolist() == kept(processors.TopPLogitsWarper(p), scores)


def bad_word_list():
    return [(3,), (5, 9), (5, 9, 11), (EOS,), (20, 20)]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1.0, 0.7, 1.3]),
    st.sampled_from([0, 4]),
    st.sampled_from([None, 0.3, 1.0, 2.5]),
    st.sampled_from([None, 0, 3, 20]),
    st.sampled_from([None, 0.2, 0.8, 1.0]),
    st.booleans(),
)
def test_the_whole_chain_matches_generate(seed, penalty, min_tokens, temperature, top_k, top_p, with_bad_words):
    """The distribution that a token is drawn from is the one that ``generate`` would draw it from."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, VOCAB_SIZE, 6).tolist()
    forced = rng.integers(0, VOCAB_SIZE, 6).tolist()
    if with_bad_words:
        forced[-2:] = [5, 9]  # so that the last step has banned words to complete
    config = transformers.GenerationConfig(
        do_sample=True,
        repetition_penalty=penalty,
        min_new_tokens=min_tokens,
        temperature=1.0 if temperature is None else temperature,
        top_k=0 if top_k is None else top_k,
        top_p=1.0 if top_p is None else top_p,
        bad_words_ids=[list(word) for word in bad_word_list()] if with_bad_words else None,
        eos_token_id=EOS,
    )
    chain = generate_processors(transformers, torch, config, len(prompt))
    chooser = chooser_of(
        prompt_ids=prompt,
        bad_words=bad_word_list() if with_bad_words else [],
        repetition_penalty=penalty,
        min_tokens=min_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p if top_p is not None else 1.0,  # given, so that the request is not greedy
        seed=seed,
    )
    logits = random_logits(len(forced), seed)
    for step, row in enumerate(logits):
        expected = chain(torch.tensor([prompt + forced[:step]]), torch.from_numpy(row.copy())[None])[0].softmax(-1)
        ids, probs = sampling_distribution(chooser.adjusted(row), chooser._params)
        found = np.zeros(VOCAB_SIZE)
        found[ids] = probs
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-7)
        chooser.take(forced[step])


def generate_processors(transformers, torch, config, prompt_length):
    """The list of processors that ``generate`` builds for a configuration."""
    model = tiny_model(transformers)
    model._prepare_special_tokens(config, device=torch.device("cpu"))
    return model._get_logits_processor(config, input_ids_seq_length=prompt_length, device="cpu")


@functools.cache
def tiny_model(transformers):
    sizes = {"hidden_size": 8, "word_embed_proj_dim": 8, "ffn_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return transformers.OPTForCausalLM(transformers.OPTConfig(vocab_size=VOCAB_SIZE, **sizes))


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_a_seed_reproduces_a_sample_whatever_else_is_in_the_batch():
    logits = random_logits(30)
    alone = tokens_of(chooser_of(temperature=1.5, seed=11), logits)
    assert len(set(alone)) > 5
    for neighbours in (1, 5):
        mine = chooser_of(temperature=1.5, seed=11)
        others = [chooser_of(temperature=0.9, seed=seed) for seed in range(neighbours)]
        together = []
        for step, row in enumerate(logits):
            batch = np.concatenate([random_logits(neighbours, seed=step + 1), row[None]])
            together.append(choose_tokens(batch, [*others, mine])[-1].token_id)
        assert together == alone


def test_another_seed_or_none_gives_another_sample():
    logits = random_logits(30)
    samples = [tokens_of(chooser_of(temperature=3.0, seed=seed), logits) for seed in (0, 1, 2**64 - 1, None, None)]
    assert len({tuple(sample) for sample in samples}) == 5


def test_samples_follow_the_distribution():
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    chooser = chooser_of(temperature=1.0, seed=3, eos=(), vocab_size=4)
    counts = np.bincount(tokens_of(chooser, np.tile(logits, (4000, 1))), minlength=4)
    np.testing.assert_allclose(counts / 4000, [0.1, 0.2, 0.3, 0.4], atol=0.03)


@pytest.mark.parametrize("temperature", [1e-38, 1e-10, 0.01])
def test_a_tiny_temperature_is_greedy_and_does_not_overflow(temperature):
    logits = random_logits(10) * np.float32(1e4)
    assert tokens_of(chooser_of(temperature=temperature, seed=0), logits) == logits.argmax(1).tolist()


def test_banned_tokens_are_never_drawn():
    logits = np.zeros((200, 4), np.float32)
    chooser = chooser_of(temperature=1.0, seed=0, bad_words=[(0,), (3,)], eos=(), vocab_size=4)
    assert set(tokens_of(chooser, logits)) == {1, 2}


def test_the_outermost_draws_are_tokens_of_the_distribution():
    class Fixed:
        def __init__(self, value):
            self.value = value

        def random(self):
            return self.value

    logits = np.array([[-np.float32(1e30), 0.0, 1.0, -np.float32(1e30)]], np.float32)
    for value, token in ((0.0, 1), (np.nextafter(1.0, 0.0), 2)):
        chooser = chooser_of(temperature=1.0, eos=(), vocab_size=4)
        chooser._rng = Fixed(value)
        assert tokens_of(chooser, logits) == [token]


# --- penalties, bans, log probabilities ------------------------------------------------------------------------------


def test_presence_and_frequency_penalties_count_generated_tokens_only():
    logits = np.array([5.0, 4.0, 3.5, 0.0], np.float32)
    chooser = chooser_of(prompt_ids=[0, 0], presence_penalty=0.5, frequency_penalty=0.75, eos=(), vocab_size=4)
    # 0: 5 -> 3.75 -> 3.0;  1: 4 -> 2.75;  2: 3.5 -> 2.25; the largest is taken each time
    assert tokens_of(chooser, np.tile(logits, (5, 1))) == [0, 1, 0, 2, 0]
    np.testing.assert_allclose(chooser.adjusted(logits), [5 - 0.5 - 3 * 0.75, 4 - 1.25, 3.5 - 1.25, 0.0])


def test_repetition_penalty_sees_prompt_placeholders_and_generated_tokens():
    logits = np.array([5.0, 4.0, 3.0, -1.0], np.float32)
    chooser = chooser_of(prompt_ids=[0, 3, 99], repetition_penalty=2.0, eos=(), vocab_size=4)  # 99 has no logit
    np.testing.assert_array_equal(chooser.adjusted(logits), [2.5, 4.0, 3.0, -2.0])
    assert tokens_of(chooser, logits[None]) == [1]
    np.testing.assert_array_equal(chooser.adjusted(logits), [2.5, 2.0, 3.0, -2.0])


def test_minimum_tokens_bans_every_end_token_until_they_are_there():
    logits = np.array([9.0, 8.0, 1.0], np.float32)
    assert tokens_of(chooser_of(min_tokens=2, eos=(0, 1), vocab_size=3), np.tile(logits, (4, 1))) == [2, 2, 0, 0]


def test_a_bad_word_of_several_tokens_is_banned_when_about_to_be_complete():
    logits = np.array([9.0, 8.0, 1.0], np.float32)
    chooser = chooser_of(prompt_ids=[2, 0], bad_words=[(0, 0, 1), (0, 0, 0)], eos=(), vocab_size=3)
    assert tokens_of(chooser, np.tile(logits, (4, 1))) == [0, 2, 0, 0]


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple)), st.lists(st.integers(0, 3), max_size=6)
)
def test_words_are_found_by_what_comes_before_their_last_token(words, history):
    expected = {word[-1] for word in words if tuple(history[len(history) - len(word) + 1 :]) == word[:-1]}
    assert {token for tokens in BannedWords(words).completing(history) for token in tokens} == expected


def test_log_probabilities_are_those_of_the_unmodified_logits():
    logits = random_logits(1)
    chooser = chooser_of(prompt_ids=[0, 1, 2], repetition_penalty=3.0, temperature=0.3, top_k=4, seed=1, log_probs=True)
    (choice,) = choose_tokens(logits, [chooser])
    assert choice.log_prob == pytest.approx(np.log(softmax(logits[0].astype(np.float64))[choice.token_id]), abs=1e-6)


# --- rows at fault ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_fails_alone(value):
    logits = random_logits(3)
    logits[1, 5] = value
    first, second, third = choose_tokens(logits, [chooser_of(), chooser_of(temperature=1.0, seed=0), chooser_of()])
    assert isinstance(second, EngineError)
    assert str(second) == "the language model computed logits that are not finite numbers"
    assert (first, third) == tuple(Choice(int(logits[row].argmax()), None) for row in (0, 2))


def test_finite_logits_whose_sum_overflows_are_fine():
    logits = np.full((1, 4), 3e38, np.float32)
    logits[0, 2] = 3.1e38
    assert choose_tokens(logits, [chooser_of()]) == [Choice(2, None)]


@pytest.mark.parametrize(
    "params",
    [
        {"bad_words": [(0,), (1,), (2,)]},
        {"bad_words": [(0,)], "min_tokens": 1, "eos": (1, 2)},
        {"bad_words": [(0,), (1,), (2,)], "temperature": 1.0},
        {"frequency_penalty": -3e38, "presence_penalty": -3e38},
    ],
)
def test_a_request_that_leaves_no_token_fails_alone(params):
    chooser = chooser_of(**{"eos": (), **params}, vocab_size=3)
    chooser.take(0)
    if "min_tokens" in params:
        chooser = chooser_of(**params, vocab_size=3)
    logits = np.array([[3.0, 2.0, 1.0]] * 2, np.float32)
    mine, other = choose_tokens(logits, [chooser, chooser_of(vocab_size=3)])
    assert isinstance(mine, InvalidRequestError)
    assert str(mine) == "the penalties, bad_words and min_tokens leave no token that can be chosen"
    assert other == Choice(0, None)


# --- logits on a device ----------------------------------------------------------------------------------------------


def test_of_logits_on_a_device_only_the_rows_that_somebody_needs_are_fetched():
    rows = random_logits(6, seed=3)
    rows[2, 5] = np.nan
    wishes = [{}, {"temperature": 1.3, "seed": 4}, {}, {"log_probs": True}, {"repetition_penalty": 1.5}, {}]
    fetched = []

    def fetch(row):
        fetched.append(row)
        return rows[row]

    on_device = DeviceLogits(rows.argmax(axis=1), rows.sum(axis=1), fetch)
    found = choose_tokens(on_device, [chooser_of(**wish) for wish in wishes])
    assert fetched == [1, 2, 3, 4]
    assert isinstance(found.pop(2), EngineError)
    expected = choose_tokens(rows, [chooser_of(**wish) for wish in wishes])
    del expected[2]
    assert found == expected


def test_a_ban_fetches_a_row_only_where_it_bans_the_largest():
    """``min_tokens`` and bad words leave most rows on the device: they change nothing but what they ban."""
    rows = random_logits(4, seed=5)
    first, second, third, _ = rows.argmax(axis=1).tolist()
    wishes = [
        {"min_tokens": 9, "eos": (first,)},
        {"min_tokens": 9, "eos": (first,)},
        {"bad_words": [(third,), (second,)]},
        {"bad_words": [(third,)]},
    ]
    fetched = []

    def fetch(row):
        fetched.append(row)
        return rows[row]

    found = choose_tokens(
        DeviceLogits(rows.argmax(axis=1), rows.sum(axis=1), fetch), [chooser_of(**wish) for wish in wishes]
    )
    assert fetched == [0, 2]
    assert found == choose_tokens(rows, [chooser_of(**wish) for wish in wishes])
    assert found[0].token_id != first
    assert found[2].token_id == rows[2].argsort()[-2]
