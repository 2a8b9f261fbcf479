"""Which source a position's sample is from: exact proportions in every block, random order inside it. Pure.

Positions are dealt to lanes in turn (position p is of lane p mod `num_lanes`), and a lane's samples of a source are
counted 0, 1, 2, ... by table look-up: the pattern of sources repeats after a period of many blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from data.order import Indices, distinct, key_of, mixed

MAX_BLOCK = 1 << 14
"""Weights of up to four decimals that add up to 1 are exact."""
PERIOD = 4096
"""The pattern of sources repeats after at least so many positions."""


class Mixture:
    """One set of weights.

    Attributes:
        names: the sources, sorted, so that the order they are written in changes nothing.
        counts: samples of each in a block, at least 1.
        lane_counts: int64 samples of each source a lane has in a period, shape (num_lanes, sources), rows equal.
    """

    def __init__(self, weights: Mapping[str, float], *, seed: int, num_lanes: int) -> None:
        """Blocks are the smallest that hold the weights exactly, or of `MAX_BLOCK` samples with the weights rounded.

        Raises:
            ValueError: there are no weights or more than `MAX_BLOCK`, or one is not above 0.
        """
        if not weights or not all(0 < weight < math.inf for weight in weights.values()):
            raise ValueError(f"mixture {dict(weights)}: it must name at least one source, each with a weight above 0")
        if len(weights) > MAX_BLOCK:
            raise ValueError(f"mixture of {len(weights)} sources: there may be {MAX_BLOCK}. Join some of them.")
        self.names = tuple(sorted(weights))
        counts = block_counts(weights)
        self.counts = tuple(counts[name] for name in self.names)
        self.num_lanes = num_lanes
        block = sum(self.counts)
        orders = -(-PERIOD // (block * num_lanes))
        self._period = orders * num_lanes * block
        words = mixed(np.arange(orders * block, dtype=np.uint64), key_of(seed, "mixture")).reshape(orders, 1, block)
        # A lane meets every place of a block in `num_lanes` blocks if blocks are turned by one whenever it would come
        # back to the same places: so each lane, too, has every source exactly as often.
        turn = np.arange(num_lanes) // (num_lanes // math.gcd(block, num_lanes))
        places = (np.arange(block) + turn[:, None]) % block
        order = np.argsort(words, axis=2, kind="stable")
        sources = np.repeat(np.arange(len(self.names), dtype=np.uint16), self.counts)
        by_lane = sources[np.take_along_axis(order, places[None], axis=2)].reshape(-1, num_lanes)
        lane_counts = np.bincount(by_lane[:, 0], minlength=len(self.names))
        # Each lane has the same sources as often: sorted, those of one source are at the same places in every lane.
        numbers = np.arange(len(by_lane)) - np.repeat(np.cumsum(lane_counts) - lane_counts, lane_counts)
        earlier = np.empty(by_lane.shape, np.int32)
        np.put_along_axis(
            earlier, np.argsort(by_lane, axis=0, kind="stable"), numbers.astype(np.int32)[:, None], axis=0
        )
        self._sources, self._earlier = by_lane.reshape(-1), earlier.reshape(-1)
        self.lane_counts: Indices = np.tile(lane_counts.astype(np.int64), (num_lanes, 1))

    @property
    def block(self) -> int:
        """Samples in a block."""
        return sum(self.counts)

    def locate(self, positions: Indices) -> tuple[npt.NDArray[np.int64], Indices]:
        """Where the samples at these positions come from.

        Args:
            positions: int64, shape (N,).

        Returns:
            For each position the source (its place in `names`) and how many samples of that source its lane had before.
        """
        periods, inside = np.divmod(positions, self._period)
        sources = self._sources[inside].astype(np.int64)
        return sources, periods * self.lane_counts[inside % self.num_lanes, sources] + self._earlier[inside]

    def counts_before(self, position: int) -> Indices:
        """Samples of each source each lane had before a position, which must be a multiple of `num_lanes`."""
        periods, inside = divmod(position, self._period)
        counts = periods * self.lane_counts
        by_lane = self._sources[:inside].reshape(-1, self.num_lanes)
        begun = [(by_lane == source).sum(axis=0) for source in range(len(self.names))]
        return np.asarray(counts + np.stack(begun, axis=1), np.int64)


@dataclass(frozen=True, slots=True)
class _Phase:
    """A mixture from a step on; `before` is what each lane had of each source by then, shape (lanes, sources)."""

    first_step: int
    mixture: Mixture
    columns: npt.NDArray[np.int64]
    before: Indices


class MixtureSchedule:
    """Mixtures that follow one another; a source goes on where it was when it comes again.

    Attributes:
        names: all sources of all mixtures, sorted.
    """

    def __init__(
        self, mixtures: Sequence[tuple[int, Mapping[str, float]]], *, seed: int, num_lanes: int, global_batch: int
    ) -> None:
        """Take up mixtures.

        Args:
            mixtures: first step and weights of each, the first from step 0, steps ascending.
            seed: of the order of sources.
            num_lanes: must divide `global_batch`.
            global_batch: samples of a step.

        Raises:
            ValueError: the steps do not ascend from 0, or weights are impossible.
        """
        steps = [step for step, _ in mixtures]
        if steps[:1] != [0] or any(step >= later for step, later in itertools.pairwise(steps)):
            raise ValueError(f"mixtures from steps {steps}: the first must be from step 0, the others ascend")
        self.names = tuple(sorted({name for _, weights in mixtures for name in weights}))
        self.num_lanes = num_lanes
        self._global_batch = global_batch
        self._phases: list[_Phase] = []
        before = np.zeros((num_lanes, len(self.names)), np.int64)
        for number, (step, weights) in enumerate(mixtures):
            mixture = Mixture(weights, seed=key_of(seed, number), num_lanes=num_lanes)
            columns = np.array([self.names.index(name) for name in mixture.names])
            self._phases.append(_Phase(step, mixture, columns, before))
            if number + 1 < len(mixtures):
                before = before.copy()
                before[:, columns] += mixture.counts_before((steps[number + 1] - step) * global_batch)

    def locate(self, ids: Indices) -> tuple[Indices, Indices, Indices]:
        """Where samples come from.

        Args:
            ids: int64 global sample ids, shape (N,): step times global batch plus row.

        Returns:
            For each the source (its place in `names`), its lane, and how many samples of it the lane had before.
        """
        steps, rows = np.divmod(ids, self._global_batch)
        lanes, inside = np.divmod(rows, self._global_batch // self.num_lanes)
        sources, counts = np.empty_like(ids), np.empty_like(ids)
        firsts = np.array([phase.first_step for phase in self._phases])
        numbers = np.searchsorted(firsts, steps, side="right") - 1
        for number in distinct(numbers).tolist():
            phase, chosen = self._phases[number], numbers == number
            positions = (steps[chosen] - phase.first_step) * self._global_batch + inside[chosen] * self.num_lanes
            within, earlier = phase.mixture.locate(positions + lanes[chosen])
            sources[chosen] = phase.columns[within]
            counts[chosen] = earlier + phase.before[lanes[chosen], sources[chosen]]
        return sources, lanes, counts

    def samples_before(self, step: int) -> dict[str, int]:
        """Samples of each source that the steps before this one take."""
        phase = max((phase for phase in self._phases if phase.first_step <= step), key=lambda phase: phase.first_step)
        counts = phase.before.copy()
        counts[:, phase.columns] += phase.mixture.counts_before((step - phase.first_step) * self._global_batch)
        return dict(zip(self.names, counts.sum(axis=0).tolist(), strict=True))


def num_lanes_of(global_batch: int, most: int) -> int:
    """The largest number of lanes up to `most` that a global batch can be dealt to evenly."""
    return max(lanes for lanes in range(1, min(most, global_batch) + 1) if global_batch % lanes == 0)


def block_counts(weights: Mapping[str, float]) -> dict[str, int]:
    """Samples of each source in a block that holds the weights, exactly where one of up to `MAX_BLOCK` samples does."""
    exact = [Fraction(str(weight)) for weight in weights.values()]
    total = sum(exact)
    shares = [weight / total for weight in exact]
    block = math.lcm(*(share.denominator for share in shares))
    counts = [int(share * block) for share in shares] if block <= MAX_BLOCK else _rounded(shares, MAX_BLOCK)
    return dict(zip(weights, counts, strict=True))


def _rounded(shares: list[Fraction], block: int) -> list[int]:
    """Whole numbers near `shares * block` that add up to `block`, none of them 0; largest remainders are rounded up."""
    counts = [max(1, int(share * block)) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda place: counts[place] - shares[place] * block)
    while sum(counts) < block:
        counts[by_remainder.pop(0)] += 1
    while sum(counts) > block:
        counts[counts.index(max(counts))] -= 1
    return counts
