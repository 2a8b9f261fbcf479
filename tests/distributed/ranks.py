"""Ranks for tests: processes that meet over gloo, whose failures and results reach the test."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import sys
import time
import traceback
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.imports import collect_garbage_of_work

LIMIT_SECONDS = 120.0
GRACE_SECONDS = 2.0


class RankFailedError(AssertionError):
    """A rank raised, died, or did not end in time; the message has its traceback."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, limit_seconds: float = LIMIT_SECONDS
) -> list[Any]:
    """Call `function(*args)` in `world_size` new processes with a gloo world; returns what each rank returned.

    `function` is a module-level function. Processes are forked from a server that has imported what is heavy and done
    nothing else, so they have the environment of the first launch. They are ended when the first fails or the limit has
    passed, and killed by the kernel if this process dies.
    """
    _start_server()
    context = multiprocessing.get_context("forkserver")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks: dict[Connection, tuple[int, Any]] = {}
    for rank in range(world_size):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_be_rank, args=(theirs, rank, world_size, store.port, function, args), daemon=True
        )
        process.start()
        theirs.close()
        ranks[mine] = (rank, process)
    processes = [process for _, process in ranks.values()]
    try:
        return _collect(ranks, time.monotonic() + limit_seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _start_server() -> None:
    """Start, once, the server that ranks are forked from: they start in milliseconds, not in seconds."""
    forkserver.set_forkserver_preload(["preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        # It is told where modules lie, but does not look there before Python 3.12, and what it does not find it passes.
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()


def _collect(ranks: dict[Connection, tuple[int, Any]], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[str] = []
    waiting = dict(ranks)
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            rank, process = waiting.pop(connection)
            try:
                failure, results[rank] = connection.recv()
            except EOFError:
                process.join()
                failure = f"died with exit code {process.exitcode}"
            if failure:
                # Those that only lost their peer often tell it sooner than the one that failed.
                failures.append(f"rank {rank}: {failure}")
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    if failures:
        raise RankFailedError("\n".join(failures))
    if waiting:
        raise RankFailedError(f"ranks {sorted(rank for rank, _ in waiting.values())} did not end in time")
    return [results[rank] for rank in sorted(results)]


def _be_rank(
    connection: Connection, rank: int, world_size: int, port: int, function: Callable[..., Any], args: Any
) -> None:
    _die_with_the_test()
    torch.set_num_threads(1)
    collect_garbage_of_work()
    try:
        _open_world(dist.TCPStore("127.0.0.1", port, is_master=False), rank, world_size)
        result = function(*args)
        dist.barrier()
        connection.send((None, result))
    except BaseException:
        connection.send((traceback.format_exc(), None))
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _die_with_the_test() -> None:
    # The server that forked this rank outlives the test process as long as there are ranks, so its death says nothing.
    # The other end of this pipe is open in the test process alone: the kernel signals when it is closed.
    test = multiprocessing.parent_process()
    assert test is not None
    fcntl.fcntl(test.sentinel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(test.sentinel, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(test.sentinel, fcntl.F_SETFL, os.O_ASYNC)
    if not test.is_alive():
        os._exit(1)


@contextmanager
def smaller_world(size: int, name: str) -> Iterator[bool]:
    """Make the first `size` ranks the world for a while; yields whether this rank is in it. The others wait.

    Args:
        size: ranks in it.
        name: unique in a launch.
    """
    with worlds((size,), name) as number:
        yield number == 0


@contextmanager
def worlds(sizes: Sequence[int], name: str) -> Iterator[int]:
    """Make the ranks worlds of these sizes for a while, one after another; ranks that are in none wait.

    Args:
        sizes: of the worlds.
        name: unique in a launch.

    Yields:
        Which world this rank is in; the number of worlds where it is in none.
    """
    rank, whole = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    ends = list(accumulate(sizes))
    number = bisect(ends, rank)
    if number < len(sizes):
        first = ends[number] - sizes[number]
        _open_world(dist.PrefixStore(f"{name} {number}", store), rank - first, sizes[number])
    yield number
    if number < len(sizes):
        dist.destroy_process_group()
    _open_world(dist.PrefixStore(f"after {name}", store), rank, whole)


def _open_world(store: dist.Store, rank: int, world_size: int) -> None:
    timeout = timedelta(seconds=LIMIT_SECONDS)

    def meet(place: str) -> None:
        store.set(f"rank {rank} is {place}", "")
        # As long as it takes (ranks outside a smaller world wait here for those inside); a launch has its own limit.
        store.wait([f"rank {other} is {place}" for other in range(world_size)], timedelta(hours=1))

    # gloo's ranks connect to each other more reliably when none of them is still importing torch.
    meet("here")
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    # One that left at once would close connections that others are still making.
    meet("connected")
