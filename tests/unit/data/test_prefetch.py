from __future__ import annotations

import threading

import pytest

from data.prefetch import Prefetch


def test_results_come_in_order_and_end() -> None:
    with Prefetch(lambda step: step * step, range(3, 10), depth=2) as results:
        assert list(results) == [step * step for step in range(3, 10)]


def test_no_more_than_depth_results_wait() -> None:
    made: list[int] = []
    third_asked = threading.Event()

    def make(step: int) -> int:
        made.append(step)
        if len(made) == 3:
            third_asked.set()
        return step

    with Prefetch(make, range(100), depth=3) as results:
        assert third_asked.wait(10)
        assert next(results) == 0
        assert len(made) <= 4
    assert len(made) <= 4


def test_an_exception_comes_where_its_result_would_have() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise OSError("shard gone")
        return step

    with Prefetch(make, range(10), depth=4) as results:
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(OSError, match="shard gone"):
            next(results)
        assert list(results) == []


def test_closing_early_ends_the_thread() -> None:
    before = threading.active_count()
    results = Prefetch(lambda step: step, range(1000), depth=2)
    assert next(results) == 0
    results.close()
    results.close()
    assert threading.active_count() == before
    assert list(results) == []
