"""From logits to tokens: penalties, bans and sampling, in the order and with the meaning of ``transformers``.

Greedy rows without penalties are one ``argmax`` over the whole batch; any other row is worked on alone, with the state
of its own sequence: what a sequence draws never depends on its neighbours.

The functions here follow the logits processors of ``transformers`` (``generation/logits_process.py``); the presence
and frequency penalties, which it lacks, follow TensorRT-LLM and count generated tokens only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from blipstream.decoding.logits import Ids, Logits, Scores, reduced
from blipstream.decoding.request import SamplingParams
from blipstream.errors import BlipstreamError, EngineError, InvalidRequestError

_NO_IDS: Ids = np.array([], np.int64)


@dataclass(frozen=True)
class Choice:
    """The token chosen for a sequence."""

    token_id: int
    log_prob: float | None
    """Natural logarithm of its probability under the unmodified logits, when asked for."""


class BannedWords:
    """Token sequences that must not be completed, by the tokens before their last: a step costs a look-up for each
    length among them, however many there are.

    Args:
        words: the sequences, none of them empty.
    """

    def __init__(self, words: Iterable[tuple[int, ...]]) -> None:
        last_tokens: dict[tuple[int, ...], set[int]] = {}
        for word in words:
            last_tokens.setdefault(word[:-1], set()).add(word[-1])
        self._last_tokens = {beginning: np.array([*tokens]) for beginning, tokens in last_tokens.items()}
        self._lengths = sorted({len(beginning) for beginning in last_tokens})

    def completing(self, history: Sequence[int]) -> Iterator[Ids]:
        """The tokens that would complete a word after ``history``, without order."""
        for length in self._lengths:
            if length > len(history):
                return
            yield self._last_tokens.get(tuple(history[len(history) - length :]), _NO_IDS)


class TokenChooser:
    """Chooses the tokens of one sequence; keeps what that needs of the sequence's past.

    Args:
        params: how to choose.
        prompt_ids: ids of the prompt, the placeholders of its soft tokens included.
        eos_token_ids: ids that ``min_tokens`` bans.
        bad_words: token sequences that are never completed.
        vocab_size: width V of the logits.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        prompt_ids: Sequence[int],
        eos_token_ids: Collection[int],
        bad_words: Collection[tuple[int, ...]],
        vocab_size: int,
    ) -> None:
        self._params = params
        self._eos_token_ids: Ids = np.array([*eos_token_ids], np.int64)
        self._bad_words = BannedWords(word for word in bad_words if len(word) > 1 or word[0] not in eos_token_ids)
        self._history = list(prompt_ids)
        self._num_prompt_ids = len(self._history)
        self._seen = {token for token in prompt_ids if token < vocab_size}
        self._generated: Counter[int] = Counter()
        self._rng = None if params.greedy else np.random.Generator(np.random.Philox(params.seed))

    def takes(self, argmax: int) -> bool:
        """Whether the next token is the largest of the unmodified logits, ``argmax``."""
        params = self._params
        return (
            params.greedy
            and params.repetition_penalty == 1.0
            and params.presence_penalty == 0.0
            and params.frequency_penalty == 0.0
            and not any(argmax in tokens for tokens in self._banned())
        )

    def _banned(self) -> Iterator[Ids]:
        """Tokens that must not come next: those that complete a bad word, and ends that come too early."""
        yield from self._bad_words.completing(self._history)
        if len(self._history) - self._num_prompt_ids < self._params.min_tokens:
            yield self._eos_token_ids

    def choose(self, logits: Logits, row: int, argmax: int) -> Choice:
        """Choose the next token from a row of the logits (B, V), which is finite, and take it into the sequence's past.

        Raises:
            InvalidRequestError: penalties and bans leave no token that could be chosen.
        """
        takes_argmax, wants_log_prob = self.takes(argmax), self._params.log_probs
        if takes_argmax and not wants_log_prob:  # a row that lies on a device stays there
            self.take(argmax)
            return Choice(argmax, None)
        scores = logits[row]
        token = argmax if takes_argmax else self._pick(scores)
        self.take(token)
        return Choice(token, _log_prob(scores, token) if wants_log_prob else None)

    def take(self, token: int) -> None:
        """Take a token into the sequence's past."""
        self._history.append(token)
        self._seen.add(token)
        self._generated[token] += 1

    def adjusted(self, logits: Scores) -> Scores:
        """The logits (V,) after penalties and bans: the scores of greedy decoding, what sampling starts from."""
        params, scores = self._params, logits.copy()
        if params.repetition_penalty != 1.0:
            penalise_repetition(scores, np.fromiter(self._seen, np.int64), params.repetition_penalty)
        if self._generated and (params.presence_penalty or params.frequency_penalty):
            ids = np.fromiter(self._generated, np.int64)
            counts = np.fromiter(self._generated.values(), np.float32)
            scores[ids] -= np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * counts
        for tokens in self._banned():
            scores[tokens] = -np.inf
        return scores

    def _pick(self, logits: Scores) -> int:
        scores = self.adjusted(logits)
        best = int(scores.argmax())
        if not math.isfinite(scores[best]):
            raise InvalidRequestError("the penalties, bad_words and min_tokens leave no token that can be chosen")
        if self._rng is None:
            return best
        ids, probs = sampling_distribution(scores, self._params)
        cumulative = probs.cumsum(dtype=np.float64)
        return int(ids[cumulative.searchsorted(self._rng.random() * cumulative[-1], side="right")])


def choose_tokens(logits: Logits, choosers: Sequence[TokenChooser]) -> list[Choice | BlipstreamError]:
    """Choose the next token of each sequence from its row of the logits (B, V).

    A row with NaN or infinite logits, or one whose request leaves no token to choose, yields its error in place of a
    choice; the other rows are not affected.
    """
    choices: list[Choice | BlipstreamError] = []
    with np.errstate(over="ignore", invalid="ignore"):  # a sum or a penalty may overflow; what comes of it is checked
        argmax, sums = reduced(logits)  # the first of equal logits, as torch does
        for row, (chooser, best, total) in enumerate(zip(choosers, argmax.tolist(), sums.tolist(), strict=True)):
            try:
                if not _is_finite(logits, row, total):
                    raise EngineError("the language model computed logits that are not finite numbers")
                choices.append(chooser.choose(logits, row, best))
            except BlipstreamError as error:
                choices.append(error)
    return choices


def penalise_repetition(scores: Scores, token_ids: Ids, penalty: float) -> None:
    """Divide the positive ones among the scores (V,) of the given tokens by the penalty, multiply the others."""
    seen = scores[token_ids]
    scores[token_ids] = np.where(seen < 0, seen * np.float32(penalty), seen / np.float32(penalty))


def sampling_distribution(scores: Scores, params: SamplingParams) -> tuple[Ids, Scores]:
    """The tokens that may be drawn, in the order of their ids, and the probability of each, from scores (V,)."""
    ids: Ids = np.arange(len(scores))
    if params.temperature is not None and params.temperature != 1.0:
        scores = (scores - scores.max()) / np.float32(params.temperature)  # shifted, so that it cannot overflow
    if params.top_k:
        ids, scores = keep_top_k(ids, scores, params.top_k)
    if params.top_p is not None and 0.0 < params.top_p < 1.0:
        ids, scores = keep_top_p(ids, scores, params.top_p)
    return ids, softmax(scores)


def keep_top_k(ids: Ids, scores: Scores, k: int) -> tuple[Ids, Scores]:
    """The tokens whose score reaches the k-th largest: k of them, or more where scores are equal there."""
    if k >= len(scores):
        return ids, scores
    kept = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
    return ids[kept], scores[kept]


def keep_top_p(ids: Ids, scores: Scores, p: float) -> tuple[Ids, Scores]:
    """The smallest set of most probable tokens whose probabilities add up to p, at least one.

    Counted from below, as in ``transformers``: a token goes if it and the less probable ones add up to at most 1 - p.
    Tokens of probability (1 - p) / V or less always go, whatever their order, so only the others are sorted. Of equals
    at the boundary, those with the larger ids stay.
    """
    probs = softmax(scores)
    candidates = np.flatnonzero((probs > (1.0 - p) / len(probs)) | (probs == probs.max()))
    order = candidates[np.argsort(scores[candidates], kind="stable")]
    below = probs.sum(dtype=np.float64) - probs[candidates].sum(dtype=np.float64)
    cumulative = below + np.cumsum(probs[order], dtype=np.float64)
    first_kept = min(int(np.searchsorted(cumulative, 1.0 - p, side="right")), len(order) - 1)
    kept = np.sort(order[first_kept:])
    return ids[kept], scores[kept]


def softmax(scores: Scores) -> Scores:
    """Probabilities (V,) of finite or minus infinite scores (V,), at least one of them finite."""
    exps: Scores = np.exp(scores - scores.max())
    exps /= exps.sum()
    return exps


def _log_prob(logits: Scores, token: int) -> float:
    shifted = logits.astype(np.float64) - logits.max()
    return float(shifted[token] - np.log(np.exp(shifted).sum()))


def _is_finite(logits: Logits, row: int, total: float) -> bool:
    """Whether a row (V,) of the logits (B, V), with the sum ``total``, holds finite numbers alone.

    A sum is finite only if its terms are, and cheaper than testing each; finite terms may overflow, so where the sum is
    not finite they are looked into.
    """
    return math.isfinite(total) or bool(np.isfinite(logits[row]).all())
