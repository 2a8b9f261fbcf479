from __future__ import annotations

import numpy as np
import pytest

from data.order import BlockShuffle, key_of, permuted


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


def shuffle_of(**changes: int) -> BlockShuffle:
    settings = {"num_runs": 480, "run_samples": 8, "window_runs": 32, "num_lanes": 4, "seed": 9}
    groups = {"group_runs": 1 if changes.get("num_lanes") == 1 else 4}
    return BlockShuffle(**{**groups, "near_runs": 10**9, "stretch_runs": 10**6, **settings, **changes})


def seen(shuffle: BlockShuffle, per_lane: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Epoch, sample and run of everything all lanes see, shapes (lanes, per_lane)."""
    lanes = np.repeat(np.arange(shuffle.num_lanes), per_lane)
    counts = np.tile(np.arange(per_lane), shuffle.num_lanes)
    epochs, runs, inside = shuffle.locate(lanes, counts)
    shape = (shuffle.num_lanes, per_lane)
    return epochs.reshape(shape), (runs * shuffle.run_samples + inside).reshape(shape), runs.reshape(shape)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_runs": 3840, "run_samples": 1, "window_runs": 1, "group_runs": 1},
        {"near_runs": 100, "stretch_runs": 25},
        {"near_runs": 100, "stretch_runs": 25, "group_runs": 1},
        {"num_runs": 470, "near_runs": 100, "stretch_runs": 25, "window_runs": 7, "num_lanes": 5},
    ],
    ids=str,
)
def test_every_pass_sees_every_sample_once(changes: dict[str, int]) -> None:
    shuffle = shuffle_of(**changes)
    num_samples = shuffle.num_runs * shuffle.run_samples
    epochs, samples, _ = seen(shuffle, 2 * num_samples // shuffle.num_lanes + shuffle.window_runs * shuffle.run_samples)
    for epoch in (0, 1):
        assert np.array_equal(np.sort(samples[epochs == epoch]), np.arange(num_samples))
    assert samples[0, :50].tolist() != samples[1, :50].tolist()


def test_a_lane_reads_each_run_within_one_window_and_no_other_lane_reads_it() -> None:
    shuffle = shuffle_of(window_runs=30)
    _, _, runs = seen(shuffle, 480 * 8 // 4)
    window = 30 * 8
    owners = [set(lane_runs.tolist()) for lane_runs in runs]
    assert sum(len(owned) for owned in owners) == len(set.union(*owners)) == 480
    for lane_runs in runs:
        for start in range(0, len(lane_runs) - window, window):
            assert len(set(lane_runs[start : start + window].tolist())) == 30


def test_lanes_side_by_side_read_neighbours_and_other_ones_in_the_next_pass() -> None:
    shuffle = shuffle_of(window_runs=30)
    _, _, runs = seen(shuffle, 2 * 480 * 8 // 4)
    in_window = 30 * 8
    assert len({frozenset((lane[:in_window] // 4).tolist()) for lane in runs}) == 1
    first, second = (set(runs[0, start : start + 960].tolist()) for start in (0, 960))
    assert len(first) == len(second) == 120
    assert 10 < len(first & second) < 60


@pytest.mark.parametrize("num_lanes", [1, 4])
def test_neighbours_are_nearly_as_far_apart_as_in_a_uniform_shuffle(num_lanes: int) -> None:
    shuffle = shuffle_of(num_runs=4096, num_lanes=num_lanes)
    _, samples, _ = seen(shuffle, 4096 * 8 // num_lanes)
    distance = np.abs(np.diff(samples[0])).mean() / (4096 * 8 / 3)
    assert 0.95 < distance < 1.03


def test_runs_near_one_another_in_time_lie_in_few_stretches() -> None:
    shuffle = shuffle_of(num_runs=10_000, num_lanes=1, run_samples=1, window_runs=1, near_runs=400, stretch_runs=100)
    _, samples, _ = seen(shuffle, 10_000)
    stretches = samples[0].reshape(-1, 400) // 100
    assert all(len(np.unique(near)) == 4 for near in stretches)
    firsts = [int(np.sort(np.unique(near))[0]) for near in stretches]
    assert np.abs(np.diff(firsts)).mean() > 10


def test_any_place_can_be_asked_for_alone() -> None:
    shuffle = shuffle_of(near_runs=100, stretch_runs=25)
    epochs, samples, _ = seen(shuffle, 2000)
    for lane, count in ((3, 1999), (0, 0), (2, 777)):
        epoch, run, inside = shuffle.locate(np.array([lane]), np.array([count]))
        assert (epoch[0], run[0] * 8 + inside[0]) == (epochs[lane, count], samples[lane, count])
