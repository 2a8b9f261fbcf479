"""Adam in host memory and on a local disk: time of a step, and the memory that stays and that a step needs.

Each runs in a process of its own on a flat parameter, as DeepSpeed gives them to a rank. Memory is what the process has
resident beyond gradients and rounded weights, which are in host memory either way; the kernel's page cache, which it
gives up when memory is short, is not counted.
"""

from __future__ import annotations

import argparse
import mmap
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.settings import OPTIM
from parallel.adam import make_adam
from parallel.disk_adam import DiskAdam
from parallel.zero import GuardedAdam

SAMPLE_SECONDS = 0.005


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Of one kind, a step."""

    seconds: float
    cpu_seconds: float
    between_bytes: int
    most_bytes: int
    checksum: float


def measure(directory: str | None, num_elements: int, num_steps: int, results: Any) -> None:
    """In a new process: take steps in host memory, or with the state in `directory`."""
    torch.set_num_threads(1)
    libraries = _resident_bytes()
    flat = torch.nn.Parameter(torch.linspace(-1, 1, num_elements))
    flat.grad = torch.linspace(1, -1, num_elements)
    kind: Callable[..., GuardedAdam] = GuardedAdam
    if directory is not None:
        kind = partial(DiskAdam, directory=Path(directory), dtype=torch.bfloat16)
    adam = make_adam([flat], OPTIM, kind)
    adam.make_state_of(flat)
    rounded = flat.detach().to(torch.bfloat16) if directory is None else flat.detach()
    adam.step()
    beside = libraries + flat.grad.nbytes + rounded.nbytes
    seconds = []
    with _Watch() as watch:
        before = time.process_time()
        for _ in range(num_steps):
            start = time.perf_counter()
            adam.step()
            if directory is None:
                rounded.copy_(flat)
            seconds.append(time.perf_counter() - start)
        cpu_seconds = (time.process_time() - before) / num_steps
    results.put(
        Result(
            seconds=statistics.median(seconds),
            cpu_seconds=cpu_seconds,
            between_bytes=watch.last - beside,
            most_bytes=watch.most - beside,
            checksum=adam.main_of(flat).double().sum().item(),
        )
    )


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


class _Watch:
    """The most that is resident while it is on, and what is when it ends."""

    def __enter__(self) -> _Watch:
        self.most, self.last, self._ends = 0, 0, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()
        self.last = _resident_bytes()

    def _look(self) -> None:
        while not self._ends.wait(SAMPLE_SECONDS):
            self.most = max(self.most, _resident_bytes())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.offload", description=__doc__)
    parser.add_argument("directory", help="of a local disk")
    parser.add_argument("--millions", type=int, default=200, help="of parameters")
    parser.add_argument("--steps", type=int, default=5)
    given = parser.parse_args(arguments)
    num_elements = given.millions * 10**6
    context = multiprocessing.get_context("spawn")
    print(
        "| masters and moments in | s a step | CPU s | GB/s read and written | resident MiB between steps | at most |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    found = []
    for name, directory in (("host memory", None), ("a file", given.directory)):
        results = context.Queue()
        process = context.Process(target=measure, args=(directory, num_elements, given.steps, results))
        process.start()
        result: Result = results.get()
        process.join()
        found.append(result)
        rate = "-" if directory is None else f"{24 * num_elements / result.seconds / 1e9:.2f}"
        memory = f"{result.between_bytes / 2**20:,.0f} | {result.most_bytes / 2**20:,.0f}"
        print(f"| {name} | {result.seconds:.2f} | {result.cpu_seconds:.2f} | {rate} | {memory} |", flush=True)
    print(f"the same numbers: {found[0].checksum == found[1].checksum}")


if __name__ == "__main__":
    main()
