from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from parallel.boxes import Box, runs_of_range, share_of_replica


@st.composite
def stacks(draw: st.DrawFn) -> list[Box]:
    """Slices of one or more logical matrices, stacked as in a fused weight; or a slice of a vector."""
    if draw(st.booleans()):
        size, start = draw(st.integers(1, 20)), draw(st.integers(0, 5))
        return [Box("vector", (start + size + 3,), (start,), (size,))]
    width, left, right = draw(st.integers(1, 6)), draw(st.integers(0, 3)), draw(st.integers(0, 3))
    boxes = []
    for index in range(draw(st.integers(1, 4))):
        rows, top = draw(st.integers(1, 5)), draw(st.integers(0, 4))
        boxes.append(Box(f"matrix {index}", (top + rows + 2, left + width + right), (top, left), (rows, width)))
    return boxes


def place(whole: dict[str, np.ndarray], box: Box) -> np.ndarray:
    """View of a box in its logical tensor."""
    logical = whole.setdefault(box.name, np.full(box.global_shape, -1))
    return logical[tuple(slice(start, start + size) for start, size in zip(box.offset, box.shape, strict=True))]


@given(stacks(), st.lists(st.integers(0, 100), max_size=6))
def test_ranges_that_tile_a_parameter_tile_its_boxes(stack, cuts):
    total = sum(box.num_elements for box in stack)
    edges = [0, *sorted(cut for cut in cuts if cut < total), total]
    flat = np.arange(total)
    whole: dict[str, np.ndarray] = {}
    for start, stop in itertools.pairwise(edges):
        runs = list(runs_of_range(stack, start, stop))
        assert [run.start for run in runs] == [start, *(run.stop for run in runs)][: len(runs)], "runs are adjacent"
        assert not runs or runs[-1].stop == stop
        for run in runs:
            view = place(whole, run.box)
            assert (view == -1).all(), "no element twice"
            view[...] = flat[run.start : run.stop].reshape(run.box.shape)
    stacked = np.concatenate([place(whole, box).ravel() for box in stack])
    assert (stacked == flat).all()
    assert sum((logical >= 0).sum() for logical in whole.values()) == total, "nothing outside the boxes"


@given(stacks(), st.data())
def test_range_is_few_boxes(stack, data):
    total = sum(box.num_elements for box in stack)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    assert len(list(runs_of_range(stack, start, stop))) <= len(stack) + 4


@given(st.lists(st.integers(0, 50), max_size=8), st.integers(1, 7))
def test_replicas_save_every_element_once_and_equally_many(sizes, num_replicas):
    shares = [share_of_replica(sizes, replica, num_replicas) for replica in range(num_replicas)]
    counts = [np.zeros(size, dtype=int) for size in sizes]
    for share in shares:
        for count, (start, stop) in zip(counts, share, strict=True):
            count[start:stop] += 1
    assert all((count == 1).all() for count in counts)
    loads = [sum(stop - start for start, stop in share) for share in shares]
    assert max(loads) - min(loads) <= 1
