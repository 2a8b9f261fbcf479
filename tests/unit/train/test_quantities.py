from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.quantities import byte_size, count, duration, estimate, percent, rate


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (812, "812"),
        (9_999, "9,999"),
        (10_000, "10K"),
        (491_520, "492K"),
        (999_960, "1M"),
        (3_200_000, "3.2M"),
        (70_553_706_496, "70.6B"),
        (8.5e12, "8.5T"),
    ],
)
def test_counts_are_short(value: float, text: str) -> None:
    assert count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (8.24, "8.2 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (7 * 3600 + 125, "7 h 2 min"),
        (45 * 86400 + 3600, "45 d 1 h"),
        (math.nan, "unknown"),
    ],
)
def test_times_have_their_two_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@given(st.floats(0, 1e15))
def test_sizes_are_never_long(value: float) -> None:
    assert len(count(value)) <= 6
    assert len(byte_size(value)) <= 12


def test_an_error_is_shown_with_two_digits_and_the_mean_as_fine_as_it() -> None:
    sign = "\N{PLUS-MINUS SIGN}"
    assert estimate(3.2141592, 0.0123) == f"3.214 {sign} 0.012"
    assert estimate(3.2141592, 0.000123) == f"3.21416 {sign} 0.00012"
    assert estimate(3.2141592, 12.0) == f"3.214 {sign} 12.000"
    assert "nan" in estimate(math.nan, math.nan)


def test_rates_and_shares() -> None:
    assert rate(3e-4) == "3.00e-04"
    assert percent(0.4123) == "41.2 %"
    assert byte_size(55_482_624) == "52.9 MiB"
