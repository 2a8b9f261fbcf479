"""Shuffling without memory: seeded bijections on [0, n), computed position by position. Pure.

`BlockShuffle` is the order of a source's samples. Samples that lie together form *runs*, as much as is read at once.
Groups of neighbouring runs are dealt in random order to *lanes*, which are contiguous rows of the global batch, each
run of a group to another lane; a lane mixes the samples of `window_runs` runs at a time. So a data rank reads only the
runs of its own lanes and each of them once, a rank of several lanes reads several runs by one request, and neighbours
in a batch come from all over the dataset.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NUM_ROUNDS = 8
WASTE = 0.01
"""Share of tokens that may be left between the last sample of a run and its end."""

Indices = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]


def distinct(values: Indices) -> Indices:
    """The different values, in order."""
    # Not np.unique, which imports numpy.ma when first called: a tenth of the time to the first batch.
    ordered = np.sort(values)
    fewer: Indices = ordered[np.diff(ordered, prepend=ordered[:1] - 1) != 0]
    return fewer


def key_of(*parts: int | str) -> int:
    """A 64-bit key from a seed and whatever tells its uses apart, e.g. the name of a source and an epoch."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def mixed(values: Keys, key: int | Keys) -> Keys:
    """Well-mixed 64-bit words, a bijection of the values for each key (the finaliser of splitmix64)."""
    words = values ^ np.asarray(key, np.uint64)
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


def permuted(indices: Indices, size: int, key: int | Keys) -> Indices:
    """Where a random-looking permutation of [0, size) sends each index; for one key a bijection.

    A Feistel network over a grid of about sqrt(size) x sqrt(size) cells that is hardly larger than [0, size); what
    lands in the rest walks on along its cycle until it is inside.

    Args:
        indices: int64, any shape, each in [0, size).
        size: number of elements, up to 2**62.
        key: tells permutations apart; one for all indices, or one for each.

    Raises:
        IndexError: an index is outside [0, size).
    """
    if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < size:
        raise IndexError(f"indices from {indices.min()} to {indices.max()} in a permutation of {size}")
    width = math.isqrt(max(size - 1, 0)) + 1
    height = -(-size // width)
    keys = np.broadcast_to(np.asarray(key, np.uint64), indices.shape)
    result = _scrambled(indices.astype(np.uint64), width, height, keys)
    outside = result >= np.uint64(size)
    while outside.any():
        result[outside] = _scrambled(result[outside], width, height, keys[outside])
        outside = result >= np.uint64(size)
    return result.astype(np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockShuffle:
    """The order of a source's samples, pass after pass; pure arithmetic.

    Attributes:
        num_runs: of the source.
        run_samples: samples of a run; `num_runs * run_samples` samples are seen once in every pass.
        window_runs: runs whose samples a lane mixes.
        num_lanes: the runs are dealt to.
        group_runs: neighbouring runs that are dealt one after another, in turning order; at most `num_lanes`.
        near_runs: runs that are drawn from at a time, in stretches of `stretch_runs` from all over the source; bounds
            how much of the index has to be at hand. At least `num_runs` in all but the largest datasets.
        stretch_runs: runs that lie together.
        seed: of all permutations.
    """

    num_runs: int
    run_samples: int
    window_runs: int
    num_lanes: int
    group_runs: int
    near_runs: int
    stretch_runs: int
    seed: int

    def locate(self, lanes: Indices, counts: Indices) -> tuple[Indices, Indices, Indices]:
        """What a lane sees after so many samples of the source.

        Args:
            lanes: int64, shape (N,).
            counts: samples of the source that the lane saw before, shape (N,).

        Returns:
            Pass over the source, run, and sample in the run, each int64 of shape (N,).
        """
        window_samples = self.window_runs * self.run_samples
        windows, inside = np.divmod(counts, window_samples)
        if window_samples > 1:
            key = key_of(self.seed, "window")
            keys = mixed(mixed(windows.astype(np.uint64), key) + lanes.astype(np.uint64), key)
            inside = permuted(inside, window_samples, keys)
        in_window, samples = np.divmod(inside, self.run_samples)
        dealt = (windows * self.window_runs + in_window) * self.num_lanes + lanes
        # A run has many samples: its place is worked out once.
        fewer = distinct(dealt)
        epochs, places = np.divmod(fewer, self.num_runs)
        runs = np.empty_like(places)
        for epoch in distinct(epochs).tolist():
            rows = epochs == epoch
            runs[rows] = self._runs(places[rows], epoch)
        found = np.searchsorted(fewer, dealt)
        return epochs[found], runs[found], samples

    def _runs(self, places: Indices, epoch: int) -> Indices:
        """The runs at these places of a pass."""
        groups, inside = np.divmod(places, self.group_runs)
        whole = self.num_runs // self.group_runs
        # Runs that fill no group stay last.
        dealt = groups < whole
        groups[dealt] = self._groups(groups[dealt], whole, epoch)
        if self.group_runs > 1:
            # Else a lane would meet the same runs in every pass.
            turns = mixed(groups.astype(np.uint64), key_of(self.seed, epoch, "turns")) % np.uint64(self.group_runs)
            inside[dealt] = (inside[dealt] + turns[dealt].astype(np.int64)) % self.group_runs
        return groups * self.group_runs + inside

    def _groups(self, places: Indices, num_groups: int, epoch: int) -> Indices:
        """The groups at these places of a pass."""
        num_near = min(max(1, self.near_runs // self.group_runs), num_groups)
        nears, inside = np.divmod(places, num_near)
        spread = np.empty_like(places)
        for near in distinct(nears).tolist():
            rows = nears == near
            size = min(num_near, num_groups - near * num_near)
            spread[rows] = near * num_near + permuted(inside[rows], size, key_of(self.seed, epoch, near))
        if num_near == num_groups:
            return spread
        # The last stretch is shorter than the others and stays last, so that the rest is a grid.
        stretch = max(1, self.stretch_runs // self.group_runs)
        whole = num_groups // stretch
        stretches, inside = np.divmod(spread, stretch)
        moved = stretches < whole
        stretches[moved] = permuted(stretches[moved], whole, key_of(self.seed, epoch, "stretches"))
        return stretches * stretch + inside


def run_blocks_of(length: int, block_tokens: int) -> int:
    """Blocks of a run: as few as hold whole samples of `length` tokens with little left over."""
    blocks = -(-length // block_tokens)
    while blocks * block_tokens % length > WASTE * blocks * block_tokens:
        blocks += 1
    return blocks


def group_runs_of(num_lanes: int, most: int) -> int:
    """Runs of a group: at most one a lane, and a power of two, so that groups fit into shards.

    >>> [group_runs_of(lanes, 4) for lanes in (1, 2, 3, 4, 16)]
    [1, 2, 2, 4, 4]
    """
    return 1 << max(1, min(num_lanes, most)).bit_length() - 1


def _scrambled(values: Keys, width: int, height: int, keys: Keys) -> Keys:
    """One pass of the network: a bijection on [0, width * height)."""
    rows, columns = np.divmod(values, np.uint64(width))
    for round_number in range(NUM_ROUNDS):
        round_keys = keys + np.uint64((round_number + 1) * 0x9E3779B97F4A7C15 % 2**64)
        if round_number % 2:
            columns = _remainder(columns + _remainder(mixed(rows, round_keys), width), width)
        else:
            rows = _remainder(rows + _remainder(mixed(columns, round_keys), height), height)
    result: Keys = rows * np.uint64(width) + columns
    return result


def _remainder(values: Keys, divisor: int) -> Keys:
    """`values % divisor`, for which numpy takes twice as long: it divides by one number without dividing."""
    quotients = values // np.uint64(divisor)
    quotients *= np.uint64(divisor)
    return values - quotients
