"""Boxes of logical tensors, and which boxes a run of elements of a local parameter is. Arithmetic only.

A local parameter is a stack of boxes: its rows are, from top to bottom, the rows of one box after the other. A fused
query-key-value weight is such a stack, and so is a plain slice (of one box).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Box:
    """Part of a logical tensor: from `offset` on, `shape` elements in each dimension."""

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Elements in the box."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Run:
    """A box that lies in one piece, row by row, in a flattened local parameter, from element `start` on."""

    box: Box
    start: int

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.box.num_elements


def runs_of_range(stack: Sequence[Box], start: int, stop: int) -> Iterator[Run]:
    """What elements [start, stop) of a flattened local parameter are.

    A range that begins or ends within a row gives up to three runs a box: the rest of a row, whole rows, the beginning
    of a row.

    >>> box = Box("w", (10, 4), (2, 0), (3, 4))
    >>> [(run.start, run.box.offset, run.box.shape) for run in runs_of_range([box], 3, 9)]
    [(3, (2, 3), (1, 1)), (4, (3, 0), (1, 4)), (8, (4, 0), (1, 1))]
    """
    base = 0
    for box in stack:
        low, high = max(start - base, 0), min(stop - base, box.num_elements)
        width = math.prod(box.shape[1:])
        while low < high:
            row, column = divmod(low, width)
            if column or high - low < width:
                end = min(high, (row + 1) * width)
                part = _rows(box, row, 1, column, end - low)
            else:
                num_rows = (high - low) // width
                end = low + num_rows * width
                part = _rows(box, row, num_rows, 0, width)
            yield Run(part, base + low)
            low = end
        base += box.num_elements


def share_of_replica(sizes: Sequence[int], replica: int, num_replicas: int) -> list[tuple[int, int]]:
    """Which elements [start, stop) of each of several flattened tensors one of their equal holders should save.

    All elements together are cut into equal parts in order, so that every replica saves as much and few tensors are
    cut; a tensor that is not of this part has an empty range.

    >>> share_of_replica([6, 4, 2], 1, 2)
    [(6, 6), (0, 4), (0, 2)]
    """
    total = sum(sizes)
    low, high = total * replica // num_replicas, total * (replica + 1) // num_replicas
    ranges, base = [], 0
    for size in sizes:
        start = min(max(low - base, 0), size)
        ranges.append((start, max(start, min(high - base, size))))
        base += size
    return ranges


def _rows(box: Box, row: int, num_rows: int, column: int, num_columns: int) -> Box:
    if len(box.shape) == 1:
        return Box(box.name, box.global_shape, (box.offset[0] + row,), (num_rows,))
    assert len(box.shape) == 2, "weights have one or two dimensions"
    return Box(box.name, box.global_shape, (box.offset[0] + row, box.offset[1] + column), (num_rows, num_columns))
