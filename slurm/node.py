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
READY_SECONDS = 300.0
LOST_SECONDS = 120.0
"""After its Ray has ended, a worker waits so long for word from the first node: a failed driver takes less to end."""
OBJECT_STORE_BYTES = 80 * 2**20
MOST_CHARACTERS = 24
"""Of a directory for Ray: its sockets lie about 75 characters deeper, and the kernel allows 107."""
STOPPED = 75
"""Exit code of a run that can be continued, as of the driver."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
ADDRESS = "address"
"""File of an attempt: where Ray listens."""
DONE = "done"
"""File of an attempt: its driver has ended."""
UP = "up-"
"""Files of an attempt, with a node's name after it: it has joined the head's Ray."""
LEFT = "left-"
"""Files of an attempt, with a node's name after it: it had joined, and nothing of its Ray is left."""
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
    raise_limits()
    chosen = dict(line.split() for line in (given.attempt / "chosen").read_text().splitlines())
    own = chosen[os.environ["SLURMD_NODENAME"]]
    options = [
        f"--node-ip-address={own}",
        # The head needs a processor more, for whoever looks after the ranks.
        f"--num-cpus={given.ranks + (given.role == 'head')}",
        f"--num-gpus={given.gpus}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        # Several jobs may share a node, and this one is fixed unless it is said.
        f"--dashboard-agent-listen-port={free_port(own)}",
        # Else every Ray of a host deals the same ports to its workers and drivers, and one of two jobs dies of it.
        "--min-worker-port=0",
        "--max-worker-port=0",
        # Ranks write their own logs; this would send what they print through the head as well.
        "--include-log-monitor=false",
        "--disable-usage-stats",
        "--block",
    ]
    if given.role == "worker":
        return serve(given.attempt, options)
    driver = ["-m", given.driver, str(given.run), f"--nodes={','.join(chosen.values())}"]
    return lead(given.attempt, given.run, own, options, driver)


def raise_limits() -> None:
    """As many files, and as much locked memory for InfiniBand, as this node lets its processes have."""
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK):
        _, most = resource.getrlimit(limit)
        resource.setrlimit(limit, (most, most))


def lead(attempt: Path, run: Path, own: str, options: list[str], driver: list[str]) -> int:
    """Ray's head on this node, at address `own`, and the driver beside it; returns the driver's exit code."""
    deadline = time.monotonic() + READY_SECONDS
    try:
        with tempfile.TemporaryDirectory(prefix="ray-", dir=short_directory(), ignore_cleanup_errors=True) as name:
            while time.monotonic() < deadline:
                port, directory = free_port(own), Path(name)
                head = ["--head", f"--port={port}", "--include-dashboard=false", "--no-monitor"]
                with running_ray([*head, *options], directory) as ray:
                    if not is_up(ray, directory):
                        continue
                    publish(attempt / ADDRESS, f"{own}:{port}")
                    missing = nodes_without_ray(attempt, ray, deadline)
                    if STOP in os.listdir(attempt):
                        return STOPPED
                    if not missing:
                        return _follow([*driver, f"--address={own}:{port}"], attempt, run)
                    print(f"error: Ray did not start on {' '.join(missing)}; logs are in {attempt}", flush=True)
                    return 1
        print(f"error: Ray's head did not start within {READY_SECONDS:.0f} s; its log is in {attempt}", flush=True)
        return 1
    finally:
        (attempt / DONE).touch()


def serve(attempt: Path, options: list[str]) -> int:
    """A node of the head's Ray, until the driver has ended."""
    address = wait_for_text(attempt / ADDRESS)
    deadline, name, joined = time.monotonic() + READY_SECONDS, os.environ["SLURMD_NODENAME"], False
    with tempfile.TemporaryDirectory(prefix="ray-", dir=short_directory(), ignore_cleanup_errors=True) as directory:
        # Ray gives up sooner than a loaded head needs to answer.
        while not joined and time.monotonic() < deadline and DONE not in os.listdir(attempt):
            with running_ray([f"--address={address}", *options], Path(directory)) as ray:
                joined = is_up(ray, Path(directory))
                if joined:
                    (attempt / f"{UP}{name}").touch()
                while ray.poll() is None and DONE not in os.listdir(attempt):
                    time.sleep(POLL_SECONDS)
    (attempt / f"{LEFT}{name}").touch()
    try:
        wait_for_text(attempt / DONE, LOST_SECONDS)
    except TimeoutError:
        return queue_again(attempt)
    return 0


def queue_again(attempt: Path) -> int:
    """Put the job back into the queue: the first node is lost, and with it the batch script that would have.

    Slurm itself does so for a job that loses any node, but one with spare nodes (`--no-kill`) would hold them, idle,
    until its time limit.
    """
    # What this process prints went through the first node.
    with (attempt / "ray-workers.log").open("a") as log:
        log.write("the first node of the job is lost: the job is queued again\n")
    return subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False).returncode


def nodes_without_ray(attempt: Path, ray: subprocess.Popen[bytes], deadline: float) -> list[str]:
    """Wait until every other node has joined; returns those that have not by the deadline."""
    names = [line.split()[0] for line in (attempt / "chosen").read_text().splitlines()][1:]
    while True:
        files = set(os.listdir(attempt))
        missing = [name for name in names if f"{UP}{name}" not in files]
        if not missing or STOP in files or ray.poll() is not None or time.monotonic() > deadline:
            return missing
        time.sleep(POLL_SECONDS)


@contextmanager
def running_ray(options: Sequence[str], directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Ray on this node, its files in `directory`; all its processes are gone after the block."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--temp-dir={directory}", *options]
    # Its own words go to standard error, so that standard output is the driver's alone.
    ray = subprocess.Popen(command, stdout=sys.stderr)
    try:
        yield ray
    finally:
        if ray.poll() is None:
            for process in [*psutil.Process(ray.pid).children(recursive=True), ray]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            ray.wait()


def is_up(ray: subprocess.Popen[bytes], directory: Path) -> bool:
    """Wait until Ray has started (it writes its address into its directory then) or has given up."""
    while ray.poll() is None:
        if (directory / "ray_current_cluster").exists():
            return True
        time.sleep(POLL_SECONDS)
    return False


def short_directory() -> str:
    """The temporary directory, or /tmp where its name is too long for the sockets within."""
    directory = tempfile.gettempdir()
    return directory if len(directory) <= MOST_CHARACTERS else "/tmp"


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


def wait_until_left(attempt: Path, node: str, seconds: float) -> None:
    """Wait until nothing of an ended attempt's Ray is left on this node; its head has been waited for already."""
    others = [line.split()[0] for line in (attempt / "chosen").read_text().splitlines()][1:]
    deadline = time.monotonic() + seconds
    while node in others and f"{LEFT}{node}" not in os.listdir(attempt) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


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
