"""Documents that are equal or nearly so, and which of them is kept: the first, in the order of the input.

Near-duplicates are found by MinHash: two documents whose sets of five-word runs have a Jaccard similarity s share at
least one of `BANDS` keys with probability 1 - (1 - s^ROWS)^BANDS: 0.05 at 0.5, 0.56 at 0.7, 0.92 at 0.8, 0.9996 at 0.9.
Documents that share a key are one group, and so are groups that share a document.
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

Indices = npt.NDArray[np.int64]


def band_keys(words_of_documents: Sequence[Hashes]) -> npt.NDArray[np.uint64]:
    """Keys of documents, uint64 of shape (documents, BANDS); a document without words has keys of nobody else: 0.

    Args:
        words_of_documents: the hash of each word of each document.
    """
    import rensa

    shingles = [runs(words, SHINGLE_WORDS) for words in words_of_documents]
    lengths = np.fromiter(map(len, shingles), np.uint64, len(shingles))
    offsets = np.concatenate([np.zeros(1, np.uint64), np.cumsum(lengths, dtype=np.uint64)])
    flat = np.concatenate([np.zeros(0, np.uint64), *shingles])
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, BANDS * ROWS, SEED)
    rows = np.array(matrix.to_rows(), np.uint64).reshape(len(shingles), BANDS, ROWS)
    keys = runs_of_bands(rows)
    keys[lengths == 0] = 0
    return keys


def runs_of_bands(rows: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """One key for each band of ROWS minima: (documents, BANDS, ROWS) to (documents, BANDS)."""
    documents = rows.shape[0]
    flat = np.ascontiguousarray(rows.reshape(-1, ROWS).T)
    mixed = np.zeros(documents * BANDS, np.uint64)
    for row in flat:
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) ^ row
        mixed ^= mixed >> np.uint64(29)
    # 0 says that a document has no keys.
    return np.maximum(mixed, np.uint64(1)).reshape(documents, BANDS)


def first_of_equals(digests: npt.NDArray[np.uint64]) -> Indices:
    """For each document the first with its digest: itself, or one before.

    Args:
        digests: uint64 of shape (documents, words of a digest).
    """
    return _first_of_groups(digests.T[::-1])


def first_of_near(keys: npt.NDArray[np.uint64]) -> Indices:
    """For each document the first of its group: itself, or one before.

    Args:
        keys: as from `band_keys`.
    """
    count = len(keys)
    group = np.arange(count, dtype=np.int64)
    for band in range(keys.shape[1]):
        column = keys[:, band]
        present = np.flatnonzero(column)
        first = present[_first_of_groups(column[None, present])]
        _join(group, present, first)
    return group


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
