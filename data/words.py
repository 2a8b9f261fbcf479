"""Words of a text as numbers, and hashes of runs of them: what near-duplicates and overlaps are found by.

Hashes are the same in every process and on every machine; they have 64 bits, so among a billion runs of words one pair
in forty would be equal by chance.
"""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import xxhash

Hashes = npt.NDArray[np.uint64]

# Scripts that are written without spaces: a character is a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_MEMO_WORDS = 1 << 18
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(29)


class WordHashes:
    """Hashes of words; remembers those of common words."""

    def __init__(self) -> None:
        self._memo: dict[str, int] = {}

    def of(self, text: str) -> Hashes:
        """The hash of each word of a text, in order; capitals, punctuation and spaces do not count. uint64."""
        memo = self._memo
        if len(memo) > _MEMO_WORDS:
            memo.clear()
        words = _WORD.findall(text.casefold())
        for word in set(words).difference(memo):
            memo[word] = xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))
        return np.fromiter((memo[word] for word in words), np.uint64, len(words))


def runs(hashes: Hashes, length: int) -> Hashes:
    """A hash for each run of `length` neighbours, uint64; one for all of them if there are fewer, none for none."""
    if not len(hashes):
        return hashes
    length = min(length, len(hashes))
    count = len(hashes) - length + 1
    mixed = np.zeros(count, np.uint64)
    for place in range(length):
        # Multiply, add, fold: order counts, and products wrap as they should.
        mixed = mixed * _FACTOR ^ hashes[place : place + count]
        mixed ^= mixed >> _SHIFT
    return mixed * _FACTOR
