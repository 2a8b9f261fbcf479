"""Shuffling without memory: seeded bijections on [0, n), computed position by position. Pure."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

NUM_ROUNDS = 8

Indices = npt.NDArray[np.int64]


def key_of(*parts: int | str) -> int:
    """A 64-bit key from a seed and whatever tells its uses apart, e.g. the name of a source and an epoch."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def mixed(values: npt.NDArray[np.uint64], key: int) -> npt.NDArray[np.uint64]:
    """Well-mixed 64-bit words, a bijection of the values for each key (the finaliser of splitmix64)."""
    words = values ^ np.uint64(key)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def permuted(indices: Indices, size: int, key: int) -> Indices:
    """Where a random-looking permutation of [0, size) sends each index; for one key a bijection.

    A Feistel network over a grid of about sqrt(size) x sqrt(size) cells that is hardly larger than [0, size); what
    lands in the rest walks on along its cycle until it is inside.

    Args:
        indices: int64, any shape, each in [0, size).
        size: number of elements, up to 2**62.
        key: tells permutations apart.

    Raises:
        IndexError: an index is outside [0, size).
    """
    if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < size:
        raise IndexError(f"indices from {indices.min()} to {indices.max()} in a permutation of {size}")
    width = math.isqrt(max(size - 1, 0)) + 1
    height = -(-size // width)
    result = _scrambled(indices.astype(np.uint64), width, height, key)
    outside = result >= np.uint64(size)
    while outside.any():
        result[outside] = _scrambled(result[outside], width, height, key)
        outside = result >= np.uint64(size)
    return result.astype(np.int64)


def _scrambled(values: npt.NDArray[np.uint64], width: int, height: int, key: int) -> npt.NDArray[np.uint64]:
    """One pass of the network: a bijection on [0, width * height)."""
    rows, columns = np.divmod(values, np.uint64(width))
    for round_number in range(NUM_ROUNDS):
        round_key = (key + (round_number + 1) * 0x9E3779B97F4A7C15) % 2**64
        if round_number % 2:
            columns = (columns + mixed(rows, round_key) % np.uint64(width)) % np.uint64(width)
        else:
            rows = (rows + mixed(columns, round_key) % np.uint64(height)) % np.uint64(height)
    result: npt.NDArray[np.uint64] = rows * np.uint64(width) + columns
    return result
