from __future__ import annotations

import numpy as np
import pytest

from data.mix import MAX_BLOCK, Mixture

MIXTURES = [
    {"a": 1.0},
    {"a": 0.7, "b": 0.3},
    {"a": 1, "b": 1, "c": 1},
    {"a": 0.6, "b": 0.25, "c": 0.15},
    {"a": 3.14159, "b": 2.71828, "c": 1e-6},
]


@pytest.mark.parametrize("weights", MIXTURES, ids=str)
def test_every_block_holds_each_source_exactly_as_often(weights: dict[str, float]) -> None:
    mixture = Mixture.of(weights, seed=3)
    sources, _ = mixture.locate(np.arange(mixture.block * 5, dtype=np.int64))
    for block in sources.reshape(5, mixture.block):
        assert tuple(np.bincount(block, minlength=len(weights))) == mixture.counts


@pytest.mark.parametrize("weights", MIXTURES[:4], ids=str)
def test_proportions_are_the_weights(weights: dict[str, float]) -> None:
    mixture = Mixture.of(weights, seed=3)
    for name, count in zip(mixture.names, mixture.counts, strict=True):
        assert count * sum(weights.values()) == pytest.approx(weights[name] * mixture.block, rel=1e-12)


def test_weights_without_a_small_block_are_rounded_and_no_source_is_lost() -> None:
    mixture = Mixture.of(MIXTURES[4], seed=3)
    assert mixture.block == MAX_BLOCK
    assert min(mixture.counts) == 1
    assert mixture.counts[0] / MAX_BLOCK == pytest.approx(3.14159 / (3.14159 + 2.71828), abs=2 / MAX_BLOCK)


@pytest.mark.parametrize("weights", MIXTURES, ids=str)
def test_each_source_is_counted_up_without_gaps(weights: dict[str, float]) -> None:
    mixture = Mixture.of(weights, seed=3)
    sources, counts = mixture.locate(np.arange(mixture.block * 3, dtype=np.int64))
    for source in range(len(weights)):
        assert counts[sources == source].tolist() == list(range(3 * mixture.counts[source]))


def test_a_position_says_the_same_alone_as_in_company() -> None:
    mixture = Mixture.of({"a": 0.6, "b": 0.25, "c": 0.15}, seed=3)
    sources, counts = mixture.locate(np.arange(100, dtype=np.int64))
    for position in (99, 0, 57):
        source, count = mixture.locate(np.array([position]))
        assert (source[0], count[0]) == (sources[position], counts[position])
    far_source, far_count = mixture.locate(np.array([10**15]))
    assert far_count[0] == pytest.approx(10**15 * mixture.counts[far_source[0]] / mixture.block, abs=mixture.block)


def test_order_inside_blocks_is_random_and_follows_the_seed() -> None:
    weights = {"a": 5, "b": 5}
    orders = [Mixture.of(weights, seed).locate(np.arange(1000, dtype=np.int64))[0] for seed in (1, 2, 1)]
    assert orders[0].tolist() == orders[2].tolist() != orders[1].tolist()
    assert 0.4 < (np.diff(orders[0]) != 0).mean() < 0.8


def test_order_of_writing_changes_nothing() -> None:
    positions = np.arange(50, dtype=np.int64)
    one, other = Mixture.of({"a": 1, "b": 3}, 7), Mixture.of({"b": 3, "a": 1}, 7)
    assert one == other
    assert one.locate(positions)[0].tolist() == other.locate(positions)[0].tolist()


@pytest.mark.parametrize("weights", [{}, {"a": 0.0}, {"a": 1.0, "b": -1.0}], ids=str)
def test_impossible_weights_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="mixture"):
        Mixture.of(weights, 0)
