"""Ray on one node of an allocation, and on the first node the driver beside it.

`python -m slurm.node head` starts Ray's head, tells the other nodes its address through the attempt's directory, and
runs the driver with that address; its exit code is the driver's. `python -m slurm.node worker ...` joins.

Slurm sends SIGTERM to every process of a job before it takes the nodes away (preemption, scancel). Ray's daemons would
end at that, and with them what there is to save, so the signal is blocked in all of them: here it is a reason to ask
the driver to stop, and what is left at the end Slurm ends itself.
"""

from __future__ import annotations

import argparse
import os
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

POLL_SECONDS = 0.25
READY_SECONDS = 180.0
OBJECT_STORE_BYTES = 80 * 2**20
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
ADDRESS = "address"
"""File of an attempt: where Ray listens."""
DONE = "done"
"""File of an attempt: its driver has ended."""
STOP = "stop"
"""File of an attempt that asks its driver to stop."""
TERMINATED = "terminated"
"""File of an attempt: Slurm itself asked this node to stop."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run Ray on this node until the driver ends; returns the driver's exit code on the head."""
    parser = argparse.ArgumentParser(prog="python -m slurm.node", description=main.__doc__)
    parser.add_argument("role", choices=("head", "worker"))
    parser.add_argument("--attempt", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--driver", help="module that works on the run; on the head")
    given = parser.parse_args(arguments)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    chosen = dict(line.split() for line in (given.attempt / "chosen").read_text().splitlines())
    own = chosen[os.environ["SLURMD_NODENAME"]]
    options = [
        f"--node-ip-address={own}",
        # The head needs a processor more, for whoever looks after the ranks.
        f"--num-cpus={given.ranks + 1}",
        f"--num-gpus={given.gpus}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        # Several jobs may share a node, and this one is fixed unless it is said.
        f"--dashboard-agent-listen-port={free_port(own)}",
        "--disable-usage-stats",
        "--block",
    ]
    if given.role == "worker":
        return serve(given.attempt, options)
    driver = ["-m", given.driver, str(given.run), f"--nodes={','.join(chosen.values())}"]
    return lead(given.attempt, given.run, own, options, driver)


def lead(attempt: Path, run: Path, own: str, options: list[str], driver: list[str]) -> int:
    """Ray's head on this node, at address `own`, and the driver beside it; returns the driver's exit code."""
    port, directory = free_port(own), tempfile.mkdtemp(prefix="ray-")
    head = ["--head", f"--port={port}", "--include-dashboard=false", "--no-monitor", f"--temp-dir={directory}"]
    try:
        with running_ray([*head, *options]) as ray:
            wait_for_ray(ray, own, port)
            publish(attempt / ADDRESS, f"{own}:{port} {directory}")
            return _follow([*driver, f"--address={own}:{port}"], attempt, run)
    finally:
        (attempt / DONE).touch()
        shutil.rmtree(directory, ignore_errors=True)


def serve(attempt: Path, options: list[str]) -> int:
    """A node of the head's Ray, until the driver has ended."""
    address, directory = wait_for_text(attempt / ADDRESS).split()
    deadline = time.monotonic() + READY_SECONDS
    # The head listens a while before it takes nodes in, and Ray gives up sooner than a loaded head needs.
    while time.monotonic() < deadline:
        with running_ray([f"--address={address}", *options]) as ray:
            while ray.poll() is None:
                if DONE in os.listdir(attempt):
                    break
                time.sleep(POLL_SECONDS)
        if DONE in os.listdir(attempt):
            shutil.rmtree(directory, ignore_errors=True)
            return 0
    return 1


@contextmanager
def running_ray(options: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Ray on this node; all its processes are gone after the block."""
    # Its own words go to standard error, so that standard output is the driver's alone.
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options]
    ray = subprocess.Popen(command, stdout=sys.stderr)
    try:
        yield ray
    finally:
        if ray.poll() is None:
            for process in [*psutil.Process(ray.pid).children(recursive=True), ray]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            ray.wait()


def free_port(address: str) -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def publish(file: Path, text: str) -> None:
    """Write a file that others wait for; they see all of it or nothing."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    temporary.write_text(text)
    temporary.rename(file)


def wait_for_text(file: Path, seconds: float = READY_SECONDS) -> str:
    """What another node publishes.

    Raises:
        TimeoutError: it did not.
    """
    deadline = time.monotonic() + seconds
    # Listing the directory makes a network file system look again.
    while file.name not in os.listdir(file.parent):
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {seconds:.0f} s there is no {file}")
        time.sleep(POLL_SECONDS)
    return file.read_text()


def wait_for_ray(ray: subprocess.Popen[bytes], address: str, port: int) -> None:
    """Wait until Ray's head listens.

    Raises:
        RuntimeError: it ended, or does not listen in time.
    """
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            socket.create_connection((address, port), timeout=1).close()
            return
        except OSError as error:
            if ray.poll() is not None:
                raise RuntimeError(f"Ray's head ended with code {ray.returncode}") from error
            if time.monotonic() > deadline:
                raise RuntimeError(f"Ray's head does not listen at {address}:{port}: {error}") from error
        time.sleep(POLL_SECONDS)


def _follow(command: list[str], attempt: Path, run: Path) -> int:
    """Run the driver; from the moment somebody asks, ask it to stop until it has heard."""
    driver = subprocess.Popen([sys.executable, *command])
    asked = False
    while driver.poll() is None:
        told = signal.sigtimedwait(STOP_SIGNALS, POLL_SECONDS)
        if told is not None:
            (attempt / TERMINATED).touch()
        if told is not None or STOP in os.listdir(attempt):
            asked = True
        if asked:
            # A driver that is just starting clears the wishes of the attempt before it.
            (run / "STOP").touch()
    return driver.returncode if driver.returncode >= 0 else 128 - driver.returncode


if __name__ == "__main__":
    sys.exit(main())
