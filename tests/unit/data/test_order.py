from __future__ import annotations

import numpy as np
import pytest

from data.order import key_of, permuted


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 10, 16, 17, 97, 100, 1000, 1023, 1025, 10007])
@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_permutation_is_a_bijection(size: int, key: int) -> None:
    image = permuted(np.arange(size, dtype=np.int64), size, key)
    assert sorted(image.tolist()) == list(range(size))


def test_any_part_of_a_permutation_can_be_asked_for_alone() -> None:
    whole = permuted(np.arange(1000, dtype=np.int64), 1000, 5)
    for index in (0, 1, 499, 999):
        assert permuted(np.array([index]), 1000, 5)[0] == whole[index]


def test_huge_ranges_need_no_memory() -> None:
    size = 2**61 + 1
    indices = np.arange(size - 1000, size, dtype=np.int64)
    image = permuted(indices, size, 1)
    assert len(set(image.tolist())) == 1000
    assert 0 <= image.min() and image.max() < size


@pytest.mark.parametrize("size", [10007, 65536, 99999])
def test_neighbours_land_as_far_apart_as_in_a_uniform_shuffle(size: int) -> None:
    image = permuted(np.arange(size, dtype=np.int64), size, 11)
    distance = np.abs(np.diff(image)).mean()
    # Two uniform points of [0, n) are n / 3 apart on average; the standard error here is at most 0.8 %.
    assert distance == pytest.approx(size / 3, rel=0.04)
    assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 0.05


def test_places_are_uniform_over_keys() -> None:
    counts = np.zeros((7, 7))
    for key in range(2000):
        counts[np.arange(7), permuted(np.arange(7, dtype=np.int64), 7, key_of("uniform", key))] += 1
    # 2000 / 7 = 286 expected in each cell, standard deviation 16: five of them.
    assert np.abs(counts - 2000 / 7).max() < 80


def test_other_keys_give_other_permutations() -> None:
    indices = np.arange(1000, dtype=np.int64)
    images = {
        tuple(permuted(indices, 1000, key_of(seed, name, epoch)).tolist())
        for seed in (1, 2)
        for name in "ab"
        for epoch in (0, 1)
    }
    assert len(images) == 8


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_outside_is_refused(index: int) -> None:
    with pytest.raises(IndexError, match="permutation of 10"):
        permuted(np.array([index]), 10, 0)
