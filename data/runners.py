"""Who does the units and the shards: this process one after another, or Ray Data on all cores of a machine or cluster.

Whoever does them leaves the same objects behind, so the bytes of a dataset do not depend on it, nor on the order in
which they end.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from conf.errors import DataError, UserError

HERE_BYTES = 256 << 20
"""Input up to this size is prepared in this process: Ray takes some seconds to start, and this much text a minute."""
OBJECT_STORE_BYTES = 80 << 20
"""Only names and index entries travel through Ray; text and tokens go by storage."""
MOST_RAY_BLOCKS = 2048

Task = Callable[[str], str]
"""What is done with an item; raises `DataError`."""


class Runner(Protocol):
    """Does a task for every item."""

    def __call__(self, task: Task, items: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Each item with its result, as they end.

        Raises:
            DataError: as the task does.
        """
        ...


def run_here(task: Task, items: Sequence[str]) -> Iterator[tuple[str, str]]:
    """One after another, in this process."""
    for item in items:
        yield item, task(item)


@contextmanager
def ray_runner(address: str | None) -> Iterator[Runner]:
    """A runner on Ray Data: on the cluster at an address, on the Ray this process is connected to, or one of its own.

    The nodes of a cluster need this project installed, and the input and the output at the same paths or URIs.

    Raises:
        UserError: Ray does not start or does not answer.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address is None:
        # Keeps other users of the machine from submitting code to our workers. Ray reads it when it is imported.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    started = not ray.is_initialized()
    try:
        if started and address is not None:
            ray.init(address=address, log_to_driver=False, logging_level="error")
        elif started:
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level="error",
            )
    except (ConnectionError, TimeoutError, RuntimeError, ValueError, OSError) as error:
        target = f"the Ray cluster at {address}" if address else "a Ray on this machine"
        raise UserError(f"cannot use {target}: {type(error).__name__}: {error}") from error
    try:
        yield _run_on_ray
    finally:
        if started:
            ray.shutdown()


def _run_on_ray(task: Task, items: Sequence[str]) -> Iterator[tuple[str, str]]:
    import ray.data

    if not items:
        return
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    blocks = min(len(items), MOST_RAY_BLOCKS)
    work = ray.data.from_items([{"item": item} for item in items], override_num_blocks=blocks)
    done = work.map(_Told(task), num_cpus=1)
    try:
        for row in done.iter_rows():
            if row["error"]:
                raise DataError(row["error"])
            yield row["item"], row["result"]
    except ray.exceptions.RayError as error:
        raise UserError(f"preparing on Ray failed: {' '.join(str(error).split())[-600:]}") from error


class _Told:
    """A task whose errors travel as text; where it runs, a process has one core."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        try:
            return {"item": row["item"], "result": self._task(row["item"]), "error": ""}
        except UserError as error:
            return {"item": row["item"], "result": "", "error": str(error)}
