"""An n-gram baseline: interpolated Kneser-Ney (Chen and Goodman 1999), one discount an order, down to uniform.

    p(w | u v) = max(c(u v w) - D, 0) / c(u v)  +  D types(u v) / c(u v)  *  p(w | v)

The highest order counts occurrences; lower ones count the different words seen before (continuations); the last is
interpolated with 1 / V, so every token has a probability. D = n1 / (n1 + 2 n2), with n1 and n2 n-grams seen once and
twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.batch import Batch

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

MERGE_AT = 1 << 22


@dataclass(frozen=True, slots=True)
class NGramScores:
    """How an n-gram predicts each row of batches. B rows.

    Attributes:
        sample_ids_B: whose row it is.
        loss_B: sum of the negative log-likelihood over counted tokens, in nats.
        correct_B: counted tokens that were the first choice.
        num_tokens_B: counted tokens.
    """

    sample_ids_B: Ints
    loss_B: Floats
    correct_B: Floats
    num_tokens_B: Floats


class NGram:
    """A trained model of order 2 (bigram) or 3 (trigram)."""

    def __init__(self, levels: Sequence[_Level], vocab_size: int) -> None:
        self.order = len(levels)
        self.vocab_size = vocab_size
        self._levels = levels

    @classmethod
    def train(cls, windows: Iterable[npt.NDArray[np.integer]], vocab_size: int, order: int = 2) -> NGram:
        """Count the n-grams inside rows of tokens.

        Args:
            windows: arrays of shape (tokens,) or (rows, tokens); n-grams do not reach from one row into the next, and a
                row that was there before (another epoch of the same text) is not counted again.
            vocab_size: tokens are below it.
            order: 2 or 3.

        Raises:
            ValueError: the order is another, or no row is as long as it.
        """
        if order not in (2, 3):
            raise ValueError(f"n-gram of order {order}: it must be 2 or 3")
        keys, counts = _counted(windows, vocab_size, order)
        if not len(keys):
            raise ValueError(f"no row of {order} tokens to train an n-gram of order {order} on")
        counted = [(keys, counts)]
        for length in range(order - 1, 0, -1):
            # Continuations: in how many different left contexts each shorter n-gram was seen.
            counted.append(np.unique(counted[-1][0] % vocab_size**length, return_counts=True))
        levels: list[_Level] = []
        for keys, counts in reversed(counted):
            contexts, tokens = np.divmod(keys, vocab_size)
            lower = _probability(levels, contexts, tokens, vocab_size)
            levels.append(_Level(keys, counts, lower, vocab_size))
        return cls(levels, vocab_size)

    def probabilities(self, context: npt.NDArray[np.integer]) -> Floats:
        """Probability of every token after the given ones (the last `order - 1` count), shape (vocab_size,)."""
        packed = _packed(np.asarray(context, np.int64)[None, -(self.order - 1) :], self.vocab_size)
        tokens = np.arange(self.vocab_size, dtype=np.int64)
        return _probability(self._levels, np.repeat(packed, self.vocab_size), tokens, self.vocab_size)

    def score(self, batches: Iterable[Batch]) -> NGramScores:
        """Score rows as a model would: each counted label after the tokens of its own row."""
        ids, loss, correct, num_tokens = [], [], [], []
        for batch in batches:
            # A token before the row is none of the vocabulary, so its context is unseen and the shorter one decides.
            before = np.full((len(batch.tokens_BS), self.order - 2), -1)
            text = np.concatenate([before, batch.tokens_BS], axis=1)
            windows = np.lib.stride_tricks.sliding_window_view(text, self.order - 1, axis=1)
            contexts = _packed(windows.reshape(-1, self.order - 1), self.vocab_size)
            labels = batch.labels_BS.reshape(-1)
            counted = batch.loss_mask_BS.astype(np.float64)
            negative_log = -np.log(_probability(self._levels, contexts, labels, self.vocab_size))
            right = self._first_choice(contexts) == labels
            ids.append(batch.sample_ids_B)
            loss.append((negative_log.reshape(counted.shape) * counted).sum(axis=1))
            correct.append((right.reshape(counted.shape) * counted).sum(axis=1))
            num_tokens.append(counted.sum(axis=1))
        return NGramScores(*(np.concatenate(parts) for parts in (ids, loss, correct, num_tokens)))

    def _first_choice(self, contexts: Ints) -> Ints:
        """The most probable token after each context."""
        distinct, row = np.unique(contexts, return_inverse=True)
        tokens = np.zeros(len(distinct), np.int64)
        best = np.full(len(distinct), 1 / self.vocab_size)
        for length, level in enumerate(self._levels):
            tokens, best = level.first_choice(distinct % self.vocab_size**length, tokens, best)
        return tokens[row]


class _Level:
    """The n-grams of one order: for each one seen, its interpolated probability after its context.

    N-grams and contexts are numbers in base `vocab_size`, sorted.
    """

    def __init__(self, keys: Ints, counts: Ints, lower: Floats, vocab_size: int) -> None:
        self._keys = keys
        self._vocab_size = vocab_size
        self._contexts, starts, row = np.unique(keys // vocab_size, return_index=True, return_inverse=True)
        totals = np.add.reduceat(counts, starts)
        num_types = np.diff(starts, append=len(keys))
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        # Text too regular to have an n-gram seen once says nothing of unseen ones; half a count is then set aside.
        discount = once / (once + 2 * twice) if once else 0.5
        self._backoff: Floats = discount * num_types / totals
        self._probabilities: Floats = (counts - discount) / totals[row] + self._backoff[row] * lower
        self._best: Floats = np.maximum.reduceat(self._probabilities, starts)
        at_best = np.flatnonzero(self._probabilities == self._best[row])
        _, first = np.unique(row[at_best], return_index=True)
        self._best_tokens: Ints = keys[at_best[first]] % vocab_size

    def probability(self, contexts: Ints, tokens: Ints, lower: Floats) -> Floats:
        """Of tokens after contexts, `lower` being what the next shorter contexts give them."""
        row, seen_context = _find(self._contexts, contexts)
        place, seen = _find(self._keys, contexts * self._vocab_size + tokens)
        backed_off = np.where(seen_context, self._backoff[row] * lower, lower)
        return np.where(seen, self._probabilities[place], backed_off)

    def first_choice(self, contexts: Ints, lower_tokens: Ints, lower_best: Floats) -> tuple[Ints, Floats]:
        """The most probable tokens and their probabilities, given those of the next shorter contexts."""
        row, seen_context = _find(self._contexts, contexts)
        backed_off = np.where(seen_context, self._backoff[row] * lower_best, lower_best)
        # A lower choice that was seen here too has an entry above its backed-off share: no need to look it up.
        is_seen = seen_context & (self._best[row] >= backed_off)
        return np.where(is_seen, self._best_tokens[row], lower_tokens), np.where(is_seen, self._best[row], backed_off)


def _probability(levels: Sequence[_Level], contexts: Ints, tokens: Ints, vocab_size: int) -> Floats:
    """Interpolated probability through the levels, from uniform up."""
    result = np.full(len(tokens), 1 / vocab_size)
    for length, level in enumerate(levels):
        result = level.probability(contexts % vocab_size**length, tokens, result)
    return result


def _find(ordered: Ints, values: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Place of each value in a sorted array, and whether it is there."""
    place = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return place, ordered[place] == values


def _packed(contexts: Ints, vocab_size: int) -> Ints:
    """Contexts (N, width) as numbers in base `vocab_size`, shape (N,)."""
    result = np.zeros(len(contexts), np.int64)
    for column in contexts.T:
        result = result * vocab_size + column
    return result


def _counted(windows: Iterable[npt.NDArray[np.integer]], vocab_size: int, order: int) -> tuple[Ints, Ints]:
    """The different n-grams of all rows, sorted, and how often each occurs."""
    merged: tuple[Ints, Ints] = (np.zeros(0, np.int64), np.zeros(0, np.int64))
    seen: set[bytes] = set()
    waiting: list[Ints] = []
    num_waiting = 0
    for rows in windows:
        for row in np.atleast_2d(rows).astype(np.int64):
            digest = hashlib.blake2b(row, digest_size=16).digest()
            if digest in seen or len(row) < order:
                continue
            seen.add(digest)
            waiting.append(_packed(np.lib.stride_tricks.sliding_window_view(row, order), vocab_size))
            num_waiting += len(waiting[-1])
        if num_waiting >= MERGE_AT:
            merged, waiting, num_waiting = _merged(merged, waiting), [], 0
    return _merged(merged, waiting)


def _merged(counted: tuple[Ints, Ints], waiting: Sequence[Ints]) -> tuple[Ints, Ints]:
    keys = np.concatenate([counted[0], *waiting])
    weights = np.concatenate([counted[1], np.ones(len(keys) - len(counted[0]), np.int64)])
    distinct, row = np.unique(keys, return_inverse=True)
    return distinct, np.bincount(row, weights, minlength=len(distinct)).astype(np.int64)
