"""A box of a logical tensor: where it starts and how far it reaches in each dimension. Arithmetic only."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Box:
    """Indices `offset[d] <= i < offset[d] + shape[d]` in every dimension d; with none, a scalar's one element."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        ranges = (f"{start}:{start + size}" for start, size in zip(self.offset, self.shape, strict=True))
        return f"[{', '.join(ranges)}]"

    @property
    def num_elements(self) -> int:
        """How many indices are in the box."""
        return math.prod(self.shape)

    def is_inside(self, shape: tuple[int, ...]) -> bool:
        """Whether the box is a box of a tensor of this shape."""
        return len(self.offset) == len(self.shape) == len(shape) and all(
            start >= 0 and size >= 0 and start + size <= whole
            for start, size, whole in zip(self.offset, self.shape, shape, strict=True)
        )

    def overlap(self, other: Box) -> Box | None:
        """What both boxes hold, or None where they share no element."""
        starts = tuple(map(max, self.offset, other.offset))
        ends = (
            min(a + m, b + n) for a, m, b, n in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        )
        shape = tuple(end - start for start, end in zip(starts, ends, strict=True))
        return Box(starts, shape) if all(size > 0 for size in shape) else None

    def minus(self, other: Box) -> list[Box]:
        """Disjoint boxes that hold what is in this box and not in the other; none where the other covers it."""
        common = self.overlap(other)
        if common is None:
            return [self]
        rest: list[Box] = []
        offset, shape = list(self.offset), list(self.shape)
        for dim, (start, size) in enumerate(zip(common.offset, common.shape, strict=True)):
            before, after = start - offset[dim], offset[dim] + shape[dim] - start - size
            if before:
                rest.append(Box(tuple(offset), (*shape[:dim], before, *shape[dim + 1 :])))
            if after:
                rest.append(
                    Box((*offset[:dim], start + size, *offset[dim + 1 :]), (*shape[:dim], after, *shape[dim + 1 :]))
                )
            offset[dim], shape[dim] = start, size
        return rest

    def slices_in(self, outer: Box) -> tuple[slice, ...]:
        """Index of this box in a tensor that holds `outer`."""
        return tuple(
            slice(start - origin, start - origin + size)
            for start, origin, size in zip(self.offset, outer.offset, self.shape, strict=True)
        )
