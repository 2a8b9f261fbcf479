"""The helper itself: failures of ranks reach the test."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from ranks import RankFailedError, run_ranks, smaller_world


def fail_on_one_rank() -> None:
    assert "megatron.core" in sys.modules
    assert not {"wandb", "torch._inductor.compile_fx"} & sys.modules.keys(), "imported in vain"
    assert torch.compile.__module__ == "torch"
    assert gc.isenabled()
    with smaller_world(1, "first rank alone") as inside:
        assert dist.is_initialized() == inside
    if dist.get_rank() == 1:
        raise ValueError("this rank has a reason")
    dist.barrier()


def die_on_one_rank() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def tell_pid_and_hang(directory: str) -> None:
    (Path(directory) / str(dist.get_rank())).write_text(str(os.getpid()))
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
    while True:
        pass


def test_traceback_of_the_rank_that_failed_reaches_the_test():
    with pytest.raises(RankFailedError, match=r"rank 1: Traceback[\s\S]*ValueError: this rank has a reason"):
        run_ranks(fail_on_one_rank, 2)


def test_killed_rank_ends_the_others():
    start = time.monotonic()
    with pytest.raises(RankFailedError, match="rank 1: died with exit code -9"):
        run_ranks(die_on_one_rank, 2)
    assert time.monotonic() - start < 60, "the rank that sleeps was not waited for"


def test_ranks_die_with_the_test_even_when_it_is_killed(tmp_path):
    launch = f"from test_ranks import *; run_ranks(tell_pid_and_hang, 2, {str(tmp_path)!r})"
    test = subprocess.Popen([sys.executable, "-c", launch], cwd=Path(__file__).parent)
    pids = [int(pid) for pid in (content_of(tmp_path / str(rank)) for rank in range(2))]
    server = psutil.Process(pids[0]).ppid()
    test.kill()
    test.wait()
    assert wait_until(lambda: not any(is_running(pid) for pid in (*pids, server)))


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def content_of(file: Path) -> str:
    assert wait_until(lambda: file.exists() and file.read_text() != "")
    return file.read_text()


def wait_until(true: Callable[[], bool], limit_seconds: float = 120.0) -> bool:
    deadline = time.monotonic() + limit_seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
    return true()
