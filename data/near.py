"""Documents that are equal or nearly so, and which of them is kept: the first, in the order of the input.

Near-duplicates are found by MinHash: two documents whose sets of five-word runs have a Jaccard similarity s share at
least one of `BANDS` keys with probability 1 - (1 - s^ROWS)^BANDS: 0.05 at 0.5, 0.56 at 0.7, 0.92 at 0.8, 0.9996 at 0.9.
Those that share one are then compared by a byte of each of their 112 minima: the share of equal bytes estimates s with
a standard deviation below 0.05, and must be `MIN_SIMILARITY`. Without that, pages of one template would drop out.
Documents that are alike are one group, and so are groups that share a document.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from data.words import Hashes, runs

SHINGLE_WORDS = 5
BANDS = 14
ROWS = 8
SEED = 1
SKETCH_BYTES = BANDS * ROWS
MIN_SIMILARITY = 0.7
PAIRS_AT_ONCE = 1 << 18

Indices = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]
Sketches = npt.NDArray[np.uint8]


def signatures(words_of_documents: Sequence[Hashes]) -> tuple[Keys, Sketches]:
    """Keys of documents, uint64 (documents, BANDS), and their sketches, uint8 (documents, SKETCH_BYTES).

    A document without words has no keys: zeros.

    Args:
        words_of_documents: the hash of each word of each document.
    """
    import rensa

    shingles = [runs(words, SHINGLE_WORDS) for words in words_of_documents]
    lengths = np.fromiter(map(len, shingles), np.uint64, len(shingles))
    offsets = np.concatenate([np.zeros(1, np.uint64), np.cumsum(lengths, dtype=np.uint64)])
    flat = np.concatenate([np.zeros(0, np.uint64), *shingles])
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, BANDS * ROWS, SEED)
    minima = np.array(matrix.to_rows(), np.uint64).reshape(len(shingles), BANDS * ROWS)
    # One key for each band of ROWS minima: the hash of the only run of that many.
    bands = minima.reshape(-1, ROWS).T
    keys = runs_of_columns(bands).reshape(len(shingles), BANDS)
    keys[lengths == 0] = 0
    return keys, minima.astype(np.uint8)


def runs_of_columns(rows: npt.NDArray[np.uint64]) -> Hashes:
    """A hash of each column, never 0."""
    mixed = np.zeros(rows.shape[1], np.uint64)
    for row in rows:
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) ^ row
        mixed ^= mixed >> np.uint64(29)
    return np.maximum(mixed, np.uint64(1))


def first_of_equals(digests: npt.NDArray[np.uint64]) -> Indices:
    """For each document the first with its digest: itself, or one before.

    Args:
        digests: uint64 of shape (documents, words of a digest).
    """
    return _first_of_groups(digests.T[::-1])


def first_of_near(keys: Keys, sketches: Sketches) -> Indices:
    """For each document the first of its group: itself, or one before.

    Args:
        keys: as from `signatures`.
        sketches: of the same documents.
    """
    group = np.arange(len(keys), dtype=np.int64)
    for band in range(keys.shape[1]):
        present = np.flatnonzero(keys[:, band])
        column = keys[present, band]
        order = np.argsort(column, kind="stable")
        again = np.flatnonzero(column[order][1:] == column[order][:-1]) + 1
        later = present[order[again]]
        # Each is compared with the first that has its key, and with the one before it.
        first = present[_first_of_groups(column[None])[order[again]]]
        for earlier in (first, present[order[again - 1]]):
            alike = _are_alike(sketches, later, earlier)
            _join(group, later[alike], earlier[alike])
    return group


def _are_alike(sketches: Sketches, one: Indices, other: Indices) -> npt.NDArray[np.bool_]:
    alike = np.zeros(len(one), bool)
    for start in range(0, len(one), PAIRS_AT_ONCE):
        some = slice(start, start + PAIRS_AT_ONCE)
        alike[some] = (sketches[one[some]] == sketches[other[some]]).mean(axis=1) >= MIN_SIMILARITY
    return alike


def _first_of_groups(columns: npt.NDArray[np.uint64]) -> Indices:
    """For each place the first place with the same values in all columns; shape (columns, places)."""
    count = columns.shape[1]
    order = np.lexsort(columns)  # stable: equal ones stay in their order
    ordered = columns[:, order]
    new = np.ones(count, bool)
    new[1:] = (ordered[:, 1:] != ordered[:, :-1]).any(axis=0)
    starts = np.maximum.accumulate(np.where(new, np.arange(count), 0))
    first = np.empty(count, np.int64)
    first[order] = order[starts]
    return first


def _join(group: Indices, one: Indices, other: Indices) -> None:
    """Make each pair one group, in place; `group` leads from each document to the first of its group."""
    while True:
        a, b = group[one], group[other]
        apart = a != b
        if not apart.any():
            return
        np.minimum.at(group, np.maximum(a, b)[apart], np.minimum(a, b)[apart])
        while (group[group] != group).any():
            group[:] = group[group]
