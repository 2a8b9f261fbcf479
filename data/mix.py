"""Which source a position's sample is from: exact proportions in every block, random order inside it. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from data.order import Indices, key_of, mixed

MAX_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Mixture:
    """How many samples of each source make a block.

    Attributes:
        names: the sources, sorted, so that the order they are written in changes nothing.
        counts: samples of each in a block, at least 1.
        seed: of the order inside blocks.
    """

    names: tuple[str, ...]
    counts: tuple[int, ...]
    seed: int

    @classmethod
    def of(cls, weights: Mapping[str, float], seed: int) -> Mixture:
        """The smallest block that holds the weights exactly, or one of `MAX_BLOCK` that rounds them.

        Raises:
            ValueError: there are no weights, or one is not above 0.
        """
        if not weights or min(weights.values()) <= 0:
            raise ValueError(f"mixture {dict(weights)}: it must name at least one source, each with a weight above 0")
        names = tuple(sorted(weights))
        exact = [Fraction(str(weights[name])) for name in names]
        shares = [weight / sum(exact) for weight in exact]
        block = math.lcm(*(share.denominator for share in shares))
        if block <= MAX_BLOCK:
            return cls(names, tuple(int(share * block) for share in shares), seed)
        return cls(names, _rounded(shares, MAX_BLOCK), seed)

    @property
    def block(self) -> int:
        """Samples in a block."""
        return sum(self.counts)

    def locate(self, positions: Indices) -> tuple[npt.NDArray[np.int64], Indices]:
        """Where the samples at these positions come from.

        Args:
            positions: int64 global sample positions, shape (N,).

        Returns:
            For each position the source (its place in `names`) and how many samples of that source came before it.
            Over positions 0, 1, 2, ... every source is counted 0, 1, 2, ... without a gap.
        """
        blocks, inside = np.divmod(positions, self.block)
        distinct, row = np.unique(blocks, return_inverse=True)
        sources_of, earlier_in = self._patterns(distinct)
        sources = sources_of[row, inside]
        counts = np.array(self.counts, np.int64)
        return sources, blocks * counts[sources] + earlier_in[row, inside]

    def _patterns(self, blocks: Indices) -> tuple[npt.NDArray[np.int64], Indices]:
        """For whole blocks, the source at each place and how many of that source come before it in the block."""
        places = (blocks[:, None] * self.block + np.arange(self.block)).astype(np.uint64)
        order = np.argsort(mixed(places, key_of(self.seed, "mixture")), axis=1, kind="stable")
        sources = np.repeat(np.arange(len(self.names)), self.counts)[order]
        earlier = np.zeros_like(sources)
        for source in range(len(self.names)):
            is_source = sources == source
            earlier += np.where(is_source, np.cumsum(is_source, axis=1) - 1, 0)
        return sources, earlier


def _rounded(shares: list[Fraction], block: int) -> tuple[int, ...]:
    """Whole numbers near `shares * block` that add up to `block`, none of them 0; largest remainders are rounded up."""
    counts = [max(1, int(share * block)) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda place: counts[place] - shares[place] * block)
    while sum(counts) < block:
        counts[by_remainder.pop(0)] += 1
    while sum(counts) > block:
        counts[counts.index(max(counts))] -= 1
    return tuple(counts)
