"""The prefix cache: what a decoder-only language model has made of an image's soft tokens, for the next question.

A prompt begins with the soft tokens, and what comes before in a row is all that its keys and values depend on. Whoever
asks again about the same image finds them here, and the prefill reads the question alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from blipstream.arrays import ArrayCache
from blipstream.decoding.request import Prompt
from blipstream.engines.cache import HostKVCache


class PrefixCache:
    """Copies of the first tokens of rows, by the soft tokens that they are of. For one thread, but for :meth:`gauges`.

    Args:
        rows: where prefixes are read, and written to.
        max_bytes: budget; the least recently used goes first.
    """

    def __init__(self, rows: HostKVCache, max_bytes: int) -> None:
        self._rows = rows
        self._kept = ArrayCache(max_bytes)
        self._num_hits = 0

    def find(self, keys: Sequence[bytes]) -> frozenset[int]:
        """Which prompts, by their keys, have soft tokens that are kept, or are those of a prompt before them."""
        return frozenset(row for row, key in enumerate(keys) if key in self._kept or key in keys[:row])

    def restore(self, row: int, key: bytes) -> bool:
        """Write what is kept by a key to the beginning of a row; return whether something is."""
        prefix = self._kept.get(key)
        if prefix is None:
            return False
        self._rows.write(row, [tensor[None] for tensor in prefix])
        self._num_hits += 1
        return True

    def keep(self, first_row: int, prompts: Sequence[Prompt], keys: Sequence[bytes]) -> None:
        """Keep what rows ``first_row ..``, filled with these prompts, begin with."""
        for row, (prompt, key) in enumerate(zip(prompts, keys, strict=True), first_row):
            if self._kept.get(key) is None:
                self._kept.put(key, self._rows.read(row, len(prompt.soft_tokens)))

    def gauges(self) -> dict[str, float]:
        """Values of its metrics."""
        return {"prefix_cache_hits_total": self._num_hits, "prefix_cache_bytes": self._kept.num_bytes}


def prefix_key(soft_tokens: npt.NDArray[np.float32]) -> bytes:
    """Of their contents, in a fraction of a millisecond: nobody has to say which image soft tokens are of."""
    return hashlib.blake2b(np.ascontiguousarray(soft_tokens).data, digest_size=16).digest()
