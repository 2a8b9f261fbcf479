from __future__ import annotations

import numpy as np
import pytest

from data.mix import MAX_BLOCK, Mixture, MixtureSchedule

MIXTURES = [
    {"a": 1.0},
    {"a": 0.7, "b": 0.3},
    {"a": 1, "b": 1, "c": 1},
    {"a": 0.6, "b": 0.25, "c": 0.15},
    {"a": 3.14159, "b": 2.71828, "c": 1e-6},
]


def mixture_of(weights: dict[str, float], num_lanes: int = 1, seed: int = 3) -> Mixture:
    return Mixture(weights, seed=seed, num_lanes=num_lanes)


def positions(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int64)


@pytest.mark.parametrize("weights", MIXTURES, ids=str)
def test_every_block_holds_each_source_exactly_as_often(weights: dict[str, float]) -> None:
    mixture = mixture_of(weights)
    sources, _ = mixture.locate(positions(mixture.block * 5))
    for block in sources.reshape(5, mixture.block):
        assert tuple(np.bincount(block, minlength=len(weights))) == mixture.counts


@pytest.mark.parametrize("weights", MIXTURES[:4], ids=str)
def test_proportions_are_the_weights(weights: dict[str, float]) -> None:
    mixture = mixture_of(weights)
    for name, count in zip(mixture.names, mixture.counts, strict=True):
        assert count * sum(weights.values()) == pytest.approx(weights[name] * mixture.block, rel=1e-12)


def test_weights_of_four_decimals_are_exact() -> None:
    assert mixture_of({"a": 0.9999, "b": 0.0001}, num_lanes=4).counts == (9999, 1)
    assert mixture_of({"a": 0.5, "b": 0.4985, "c": 0.0015}).counts == (1000, 997, 3)


def test_many_sources_all_have_their_share() -> None:
    names = [f"source {number}" for number in range(2000)]
    assert set(mixture_of(dict.fromkeys(names, 1.0)).counts) == {1}
    with pytest.raises(ValueError, match="20000 sources: there may be 16384"):
        mixture_of(dict.fromkeys(map(str, range(20_000)), 1.0))


def test_weights_without_a_small_block_are_rounded_and_no_source_is_lost() -> None:
    mixture = mixture_of(MIXTURES[4])
    assert mixture.block == MAX_BLOCK
    assert min(mixture.counts) == 1
    assert mixture.counts[0] / MAX_BLOCK == pytest.approx(3.14159 / (3.14159 + 2.71828), abs=2 / MAX_BLOCK)


@pytest.mark.parametrize("num_lanes", [1, 3, 64])
@pytest.mark.parametrize("weights", MIXTURES, ids=str)
def test_each_lane_counts_each_source_up_without_gaps(weights: dict[str, float], num_lanes: int) -> None:
    mixture = mixture_of(weights, num_lanes)
    places = positions(3 * 1024 * 64)
    sources, counts = mixture.locate(places)
    for lane in range(num_lanes):
        for source in range(len(weights)):
            seen = counts[(places % num_lanes == lane) & (sources == source)]
            assert np.array_equal(seen, np.arange(len(seen)))
            assert mixture.counts_before(len(places))[lane, source] == len(seen)


def test_a_position_says_the_same_alone_as_in_company() -> None:
    mixture = mixture_of({"a": 0.6, "b": 0.25, "c": 0.15}, 4)
    sources, counts = mixture.locate(positions(100))
    for position in (99, 0, 57):
        source, count = mixture.locate(np.array([position]))
        assert (source[0], count[0]) == (sources[position], counts[position])
    far_source, far_count = mixture.locate(np.array([10**15]))
    share = mixture.counts[far_source[0]] / mixture.block
    assert far_count[0] == pytest.approx(10**15 / 4 * share, rel=1e-9)
    assert (mixture.lane_counts == mixture.lane_counts[0]).all()


def test_order_inside_blocks_is_random_and_follows_the_seed() -> None:
    orders = [mixture_of({"a": 5, "b": 5}, seed=seed).locate(positions(1000))[0] for seed in (1, 2, 1)]
    assert orders[0].tolist() == orders[2].tolist() != orders[1].tolist()
    assert 0.4 < (np.diff(orders[0]) != 0).mean() < 0.8


def test_order_of_writing_changes_nothing() -> None:
    one, other = mixture_of({"a": 1, "b": 3}), mixture_of({"b": 3, "a": 1})
    assert one.names == other.names
    assert one.locate(positions(50))[0].tolist() == other.locate(positions(50))[0].tolist()


@pytest.mark.parametrize("weights", [{}, {"a": 0.0}, {"a": 1.0, "b": -1.0}, {"a": float("nan")}], ids=str)
def test_impossible_weights_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="mixture"):
        mixture_of(weights)


def test_a_schedule_changes_the_mixture_and_sources_go_on_where_they_were() -> None:
    schedule = MixtureSchedule(
        [(0, {"a": 1, "b": 1}), (5, {"b": 3, "c": 1}), (9, {"a": 1})], seed=7, num_lanes=4, global_batch=16
    )
    ids = positions(16 * 12)
    sources, lanes, counts = schedule.locate(ids)
    shares = [np.bincount(sources[step * 16 : step * 16 + 16], minlength=3).tolist() for step in range(12)]
    assert shares == [[8, 8, 0]] * 5 + [[0, 12, 4]] * 4 + [[16, 0, 0]] * 3
    assert np.array_equal(lanes, ids % 16 // 4)
    for lane in range(4):
        for source in range(3):
            seen = np.sort(counts[(lanes == lane) & (sources == source)])
            assert np.array_equal(seen, np.arange(len(seen)))
    assert schedule.samples_before(11) == {"a": 40 + 32, "b": 40 + 48, "c": 16}


@pytest.mark.parametrize("steps", [[], [1], [0, 3, 3], [0, 5, 2]], ids=str)
def test_steps_that_do_not_ascend_are_refused(steps: list[int]) -> None:
    with pytest.raises(ValueError, match="must be from step 0"):
        MixtureSchedule([(step, {"a": 1}) for step in steps], seed=1, num_lanes=1, global_batch=4)
