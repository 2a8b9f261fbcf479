"""What a node must show before it is given ranks. Runs on every node at once and prints one line of JSON.

Checks that have nothing to look at (no GPU, no InfiniBand, one rank a node) say so in `unchecked`; they are never
taken for passed. What a node says goes to standard output, through Slurm and not through the file system, because the
file system is one of the things that are checked.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from slurm.node import publish, raise_limits, wait_for_text, wait_until_left
from slurm.topology import addresses

GIB = 2**30
TOOL_SECONDS = 60
CLOCK_SECONDS = 10.0
LEAVE_SECONDS = 10.0
"""As long as the batch script gives the workers of an attempt to end by themselves."""
CLOCK = "clock"
"""File of an attempt: where the first node tells the time."""
MEASUREMENTS = 4
"""Within the node, with two others, and time to start: a node whose partners are lost still reports in time."""
IDLE_GPU_MIB = 1024
"""A GPU nobody uses shows a few hundred MiB, of the driver's own."""
FATAL_XIDS = {48, 63, 64, 74, 79, 94, 95, 119, 120, 140}
"""Double-bit errors, failed row remapping, NVLink, fallen off the bus, contained errors, GSP: the GPU needs a reset."""
GPU_FIELDS = (
    "index",
    "memory.used",
    "ecc.errors.uncorrected.volatile.total",
    "remapped_rows.pending",
    "remapped_rows.failure",
)
INFINIBAND = Path("/sys/class/infiniband")


@dataclass(kw_only=True, slots=True)
class Report:
    """What a node says of itself.

    Attributes:
        node: its name in Slurm.
        faults: why it must not get ranks.
        unchecked: what there was nothing to look at for.
        sees_run: whether the run directory here is the one the job was started from.
        clock_offset: seconds its clock is ahead of the first node's; None where it could not ask.
        intra_node_gb_per_second: bus bandwidth of an all-reduce over its ranks.
        pairs: other node -> `fast (...)` or `slow (...)`, or None where it did not finish.
    """

    node: str
    faults: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    sees_run: bool = False
    clock_offset: float | None = None
    intra_node_gb_per_second: float | None = None
    pairs: dict[str, str | None] = field(default_factory=dict)


def mark_file(attempt: Path, node: str) -> Path:
    """Written by a node where it believes the attempt's directory to be."""
    return attempt / f"seen-{node}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Check this node and print its report."""
    parser = argparse.ArgumentParser(prog="python -m slurm.preflight", description=main.__doc__)
    parser.add_argument("--attempt", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--infiniband-ports", type=int, default=0)
    parser.add_argument("--infiniband-gbit", type=float, default=0)
    parser.add_argument("--disk-gib", type=float, default=0)
    parser.add_argument("--intra-node", type=float, default=0, help="least GB/s within a node; 0: not measured")
    parser.add_argument("--node-pair", type=float, default=0, help="least GB/s between two nodes; 0: not measured")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--after", type=Path, help="attempt that failed: is a node the reason, and which?")
    given = parser.parse_args(arguments)
    raise_limits()
    report = Report(node=os.environ["SLURMD_NODENAME"])
    if given.after is not None:
        # Memory that a rank still held would be taken for somebody else's.
        wait_until_left(given.after, report.node, LEAVE_SECONDS)
    checks: list[tuple[str, Callable[[], Iterator[str]]]] = [
        ("GPUs", lambda: gpu_faults(given.gpus)),
        ("GPU errors in the kernel's log", lambda: xid_faults(given.gpus)),
        ("NVLink", lambda: nvlink_faults(given.gpus)),
        ("InfiniBand", lambda: infiniband_faults(INFINIBAND, given.infiniband_ports, given.infiniband_gbit)),
        ("locked memory", lambda: locked_memory_faults(given.infiniband_ports)),
        ("the local disk", lambda: disk_faults(given.disk_gib)),
    ]
    for what, check in checks:
        try:
            report.faults += check()
        except Unchecked as reason:
            report.unchecked.append(f"{what}: {reason}")
    report.sees_run = look_at_run(given.attempt, given.run, report.node)
    # What nodes do together is for the start: a node that is lost would only be waited for.
    if report.sees_run and given.after is None:
        nodes = (given.attempt / "asked").read_text().split()
        with answering_clock(given.attempt, nodes, report.node):
            report.clock_offset = clock_offset(given.attempt, nodes, report.node)
            if report.clock_offset is None:
                report.unchecked.append("the clock: the first node did not answer")
            measure(report, given, nodes)
    print(json.dumps(asdict(report)), flush=True)
    return 0


class Unchecked(Exception):
    """There is nothing to look at; the message says why."""


def gpu_faults(wanted: int) -> Iterator[str]:
    """As many GPUs as ranks, nobody on them, no uncorrected memory errors, and no row waiting to be remapped.

    Raises:
        Unchecked: no GPU is asked for.
    """
    if wanted == 0:
        raise Unchecked("the ranks run on CPUs")
    output = _tool("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits")
    if output.fault:
        yield output.fault
        return
    yield from parse_gpus(output.text, wanted)


def parse_gpus(listing: str, wanted: int) -> Iterator[str]:
    """Faults in a listing of `index, used MiB, uncorrected errors, rows pending, rows failed`, a line a GPU.

    Boards without ECC or remapping say `[N/A]` or `[Not Supported]`; any other words in brackets are a GPU's last ones.
    """
    rows = [[part.strip() for part in line.split(",")] for line in listing.splitlines() if line.strip()]
    if len(rows) < wanted:
        yield f"{len(rows)} GPUs are visible, {wanted} are needed"
    for row in rows:
        last_words = {field for field in row if re.search("lost|reset|error", field, re.IGNORECASE)}
        if last_words or len(row) != len(GPU_FIELDS):
            yield f"GPU {row[0]} answers {' '.join(sorted(last_words)) or ', '.join(row)}"
            continue
        index, used, uncorrected, pending, failure = row
        if used.isdigit() and int(used) > IDLE_GPU_MIB:
            yield f"GPU {index} is not empty: {used} MiB are in use"
        if uncorrected.isdigit() and int(uncorrected) > 0:
            yield f"GPU {index} has {uncorrected} uncorrected memory errors since its last reset"
        if pending.lower() in ("1", "yes"):
            yield f"GPU {index} waits for a reset to remap memory rows"
        if failure.lower() in ("1", "yes"):
            yield f"GPU {index} has memory rows that could not be remapped"


def xid_faults(gpus: int) -> Iterator[str]:
    """No fatal GPU error in the kernel's log since boot.

    Raises:
        Unchecked: no GPU is asked for, or the log cannot be read.
    """
    if gpus == 0:
        raise Unchecked("the ranks run on CPUs")
    output = _tool("dmesg", "--level=err,warn,info")
    if output.fault:
        raise Unchecked(output.fault)
    yield from parse_xids(output.text)


def parse_xids(log: str) -> Iterator[str]:
    """Fatal errors in lines like `NVRM: Xid (PCI:0000:3b:00): 79, pid=1, ...`, each kind on each GPU once."""
    seen: dict[tuple[str, int], None] = {}
    for device, number in re.findall(r"NVRM: Xid \(([^)]*)\): (\d+)", log):
        if int(number) in FATAL_XIDS:
            seen[device, int(number)] = None
    for device, number_ in seen:
        yield f"Xid {number_} on {device} since boot"


def nvlink_faults(gpus: int) -> Iterator[str]:
    """Every NVLink of every GPU is up.

    Raises:
        Unchecked: fewer than two GPUs are asked for, or they have no NVLink.
    """
    if gpus < 2:
        raise Unchecked("fewer than two GPUs")
    output = _tool("nvidia-smi", "nvlink", "--status")
    if output.fault:
        raise Unchecked(output.fault)
    if "Link" not in output.text:
        raise Unchecked("these GPUs have none")
    yield from parse_nvlinks(output.text)


def parse_nvlinks(status: str) -> Iterator[str]:
    """Inactive links in the output of `nvidia-smi nvlink --status`."""
    gpu = ""
    for line in status.splitlines():
        if found := re.match(r"GPU (\d+)", line):
            gpu = found[1]
        elif "inactive" in line.lower():
            yield f"GPU {gpu}: {' '.join(line.split())}"


def infiniband_faults(root: Path, ports: int, gbit: float) -> Iterator[str]:
    """As many active ports at full rate as asked for. A node may have others: not cabled, or slower, for storage.

    Args:
        root: the kernel's directory of InfiniBand devices.
        ports: how many are needed.
        gbit: least rate of each, in Gbit/s.

    Raises:
        Unchecked: none are asked for.
    """
    if ports == 0:
        raise Unchecked("none is asked for")
    sound, others = 0, []
    for port in sorted(root.glob("*/ports/*")):
        if (port / "link_layer").exists() and (port / "link_layer").read_text().strip() != "InfiniBand":
            continue
        name = f"{port.parent.parent.name} port {port.name}"
        state, rate = (port / "state").read_text().strip(), (port / "rate").read_text().strip()
        if "ACTIVE" not in state:
            others.append(f"{name} is {state.partition(': ')[2] or state}")
        elif float(rate.split()[0]) < gbit:
            others.append(f"{name} runs at {rate}")
        else:
            sound += 1
    if sound < ports:
        yield "; ".join([f"{sound} InfiniBand ports are active at {gbit:g} Gb/sec, {ports} are needed", *others])


def locked_memory_faults(ports: int) -> Iterator[str]:
    """A process may lock the memory that InfiniBand works on.

    Raises:
        Unchecked: no InfiniBand is asked for.
    """
    if ports == 0:
        raise Unchecked("no InfiniBand is asked for")
    _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if most != resource.RLIM_INFINITY and most < GIB:
        yield (
            f"a process may lock {most // 1024} KiB of memory, InfiniBand needs it unlimited: type ulimit -l unlimited "
            "before you submit, or have PropagateResourceLimitsExcept=MEMLOCK set in slurm.conf"
        )


def disk_faults(gib: float) -> Iterator[str]:
    """Enough free space on the node's own disk, and it can be written."""
    directory = tempfile.gettempdir()
    free = shutil.disk_usage(directory).free
    if free < gib * GIB:
        yield f"{directory} has {free / GIB:.0f} GiB free, {gib:g} are needed"
    try:
        with tempfile.TemporaryFile() as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        yield f"{directory} cannot be written: {error.strerror}"


def look_at_run(attempt: Path, run: Path, node: str) -> bool:
    """Whether the run's files are here; leaves a mark that the first node looks for."""
    if not (run / "config.json").exists() or not (attempt / "asked").exists():
        return False
    try:
        mark_file(attempt, node).touch()
    except OSError:
        return False
    return True


@contextmanager
def answering_clock(attempt: Path, nodes: Sequence[str], node: str) -> Iterator[None]:
    """Let the first node answer all others with its time; it stays until they have asked, or had time to."""
    if node != nodes[0] or len(nodes) == 1:
        yield
        return
    host = socket.gethostbyname(addresses((attempt / "nodes").read_text())[node])
    with socket.create_server((host, 0), backlog=4096) as server:

        def answer() -> None:
            for _ in nodes[1:]:
                connection, _ = server.accept()
                with connection:
                    connection.sendall(f"{time.time()}\n".encode())

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        publish(attempt / CLOCK, f"{host} {server.getsockname()[1]}")
        yield
        thread.join(CLOCK_SECONDS)


def clock_offset(attempt: Path, nodes: Sequence[str], node: str) -> float | None:
    """Seconds this node's clock is ahead of the first node's; None where that one does not answer."""
    if node == nodes[0]:
        return 0.0
    try:
        host, port = wait_for_text(attempt / CLOCK, CLOCK_SECONDS).split()
        with socket.create_connection((host, int(port)), timeout=CLOCK_SECONDS) as connection:
            asked = time.time()
            theirs = float(connection.makefile().readline())
            return (asked + time.time()) / 2 - theirs
    except (OSError, ValueError):
        return None


def measure(report: Report, given: argparse.Namespace, nodes: Sequence[str]) -> None:
    """All-reduce within the node and with two others, where thresholds are set."""
    intra_node = given.intra_node > 0 and given.ranks > 1
    node_pair = given.node_pair > 0 and len(nodes) > 1
    if not intra_node:
        why = "one rank a node" if given.intra_node else "not asked for"
        report.unchecked.append(f"all-reduce in the node: {why}")
    if not node_pair:
        why = "one node" if given.node_pair else "not asked for"
        report.unchecked.append(f"all-reduce between nodes: {why}")
    if not (intra_node or node_pair):
        return
    command = [
        *(sys.executable, "-m", "slurm.bandwidth", f"--attempt={given.attempt}", f"--ranks={given.ranks}"),
        *(f"--device={'cuda' if given.gpus else 'cpu'}", f"--seconds={given.seconds / MEASUREMENTS:g}"),
        *(["--intra-node"] * intra_node + ["--node-pair"] * node_pair),
    ]
    ranks = [
        subprocess.Popen(
            [*command, f"--local-rank={rank}"], stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        )
        for rank in range(given.ranks)
    ]
    output, _ = ranks[0].communicate()
    for rank in ranks[1:]:
        rank.kill()
        rank.wait()
    measured: dict[str, float | None] = json.loads(output) if output else {}
    own = report.node
    for name, speed in measured.items():
        if name == own:
            report.intra_node_gb_per_second = speed
        else:
            report.pairs[name] = _verdict(speed, given.node_pair)
    speed = measured.get(own)
    if intra_node and (speed is None or speed < given.intra_node):
        did = "did not finish" if speed is None else f"is {speed:.2f} GB/s, {given.intra_node:g} are needed"
        report.faults.append(f"all-reduce in the node {did}")


def _verdict(speed: float | None, least: float) -> str | None:
    if speed is None:
        return None
    return f"{'slow' if speed < least else 'fast'} ({speed:.2f} GB/s, {least:g} are needed)"


@dataclass(frozen=True, slots=True)
class _Output:
    text: str
    fault: str | None


def _tool(*command: str) -> _Output:
    """Output of a program, or why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_SECONDS, check=False)
    except FileNotFoundError:
        return _Output("", f"there is no {command[0]}")
    except subprocess.TimeoutExpired:
        return _Output("", f"{command[0]} did not answer within {TOOL_SECONDS} s")
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())
        return _Output("", f"{command[0]} failed: {said[:200]}")
    return _Output(done.stdout, None)


if __name__ == "__main__":
    sys.exit(main())
