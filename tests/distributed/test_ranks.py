"""The helper itself: failures of ranks reach the test."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch.distributed as dist
from ranks import RankFailedError, run_ranks, smaller_world


def fail_on_one_rank() -> None:
    with smaller_world(1, "first rank alone") as inside:
        assert dist.is_initialized() == inside
    if dist.get_rank() == 1:
        raise ValueError("this rank has a reason")
    dist.barrier()


def die_on_one_rank() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_traceback_of_the_rank_that_failed_reaches_the_test():
    with pytest.raises(RankFailedError, match=r"rank 1: Traceback[\s\S]*ValueError: this rank has a reason"):
        run_ranks(fail_on_one_rank, 2)


def test_killed_rank_ends_the_others():
    start = time.monotonic()
    with pytest.raises(RankFailedError, match="rank 1: died with exit code -9"):
        run_ranks(die_on_one_rank, 2)
    assert time.monotonic() - start < 60, "the rank that sleeps was not waited for"
