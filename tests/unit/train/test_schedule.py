from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import OPTIM

from conf.schema import OptimConfig
from train.schedule import learning_rate

fractions = st.floats(0, 1)
optims = st.builds(
    lambda peak, ratio, schedule, warmup, decay: replace(
        OPTIM,
        learning_rate=peak,
        final_learning_rate_ratio=ratio,
        schedule=schedule,
        warmup_fraction=warmup,
        decay_fraction=decay,
    ),
    st.floats(1e-8, 10),
    fractions,
    st.sampled_from(["cosine", "wsd"]),
    fractions,
    fractions,
)


def rates(optim: OptimConfig, num_steps: int) -> list[float]:
    return [learning_rate(optim, step, num_steps) for step in range(num_steps)]


@given(optims, st.integers(1, 300))
def test_rate_rises_to_the_peak_and_never_rises_again(optim: OptimConfig, num_steps: int) -> None:
    found = rates(optim, num_steps)
    peak = found.index(max(found))
    assert found[peak] == pytest.approx(optim.learning_rate)
    assert all(earlier < later for earlier, later in pairwise(found[: peak + 1]))
    assert all(earlier >= later for earlier, later in pairwise(found[peak:]))


@given(optims, st.integers(1, 300))
def test_every_step_but_a_last_one_decayed_to_zero_learns(optim: OptimConfig, num_steps: int) -> None:
    found = rates(optim, num_steps)
    assert all(rate > 0 for rate in found[:-1])
    assert found[0] > 0 or num_steps == 1
    assert all(rate <= optim.learning_rate * (1 + 1e-12) for rate in found)


@given(optims, st.integers(2, 300))
def test_last_step_has_exactly_the_final_ratio(optim: OptimConfig, num_steps: int) -> None:
    optim = replace(optim, warmup_fraction=optim.warmup_fraction / 4, decay_fraction=0.5 + optim.decay_fraction / 2)
    last = learning_rate(optim, num_steps - 1, num_steps)
    assert last == pytest.approx(optim.learning_rate * optim.final_learning_rate_ratio, abs=1e-15)


def test_warm_up_is_linear_and_as_long_as_asked() -> None:
    optim = replace(OPTIM, learning_rate=1.0, warmup_fraction=0.1)
    found = rates(optim, 100)
    assert found[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert found[10] < 1.0


def test_cosine_is_half_way_down_in_the_middle_of_the_decay() -> None:
    optim = replace(OPTIM, learning_rate=1.0, warmup_fraction=0.0, final_learning_rate_ratio=0.2)
    assert learning_rate(optim, 50, 101) == pytest.approx(0.6)


def test_wsd_is_stable_until_its_last_part_and_then_falls_linearly() -> None:
    optim = replace(
        OPTIM,
        schedule="wsd",
        learning_rate=1.0,
        warmup_fraction=0.1,
        decay_fraction=0.2,
        final_learning_rate_ratio=0.0,
    )
    found = rates(optim, 100)
    assert set(found[9:80]) == {1.0}
    falls = [earlier - later for earlier, later in pairwise(found[79:])]
    assert falls == pytest.approx([0.05] * 20)


@pytest.mark.parametrize("step", [-1, 10, 11])
def test_steps_outside_the_stage_are_refused(step: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        learning_rate(OPTIM, step, 10)
