"""What this machine has, without torch: cores and memory this process may use, and GPUs."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

MIB = 2**20
GIB = 2**30
NVIDIA_SMI_SECONDS = 30


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest directory above it that exists."""
    path = path.expanduser().absolute()
    return next(each for each in (path, *path.parents) if os.path.exists(each))


def file_system_of(path: Path) -> str:
    """Type of the file system (`ext4`, `tmpfs`, `nfs4`) where `path` is or would be made; "" where that is not told."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return ""
    place = os.path.realpath(existing_parent(path))
    # The last of those that were mounted over each other counts.
    found = (line.split() for line in mounts.read_text().splitlines())
    around = [(len(where), kind) for _, where, kind, *_ in found if os.path.commonpath((where, place)) == where]
    return max(reversed(around), key=lambda each: each[0], default=(0, ""))[1]


def free_disk_bytes(path: Path) -> int:
    """Free space where `path` is or would be made."""
    return shutil.disk_usage(existing_parent(path)).free


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What can be used here.

    Attributes:
        cores: CPU cores this process may use.
        memory_bytes: host memory this process may use.
        gpus: name of each GPU.
        gpu_memory_bytes: memory of the smallest GPU; 0 where there is none.
        gpu_fault: why the driver's tool could not list GPUs, or None.
        environment: the environment variables of this process.
        free_disk_bytes: free space at a path that need not exist yet.
        file_system_of: type of the file system there.
    """

    cores: int
    memory_bytes: int
    gpus: tuple[str, ...] = ()
    gpu_memory_bytes: int = 0
    gpu_fault: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    free_disk_bytes: Callable[[Path], int] = free_disk_bytes
    file_system_of: Callable[[Path], str] = file_system_of

    def __str__(self) -> str:
        names = dict.fromkeys(self.gpus)
        gpus = ", ".join(f"{self.gpus.count(name)} x {name}" for name in names) or "no GPU"
        cores = "1 CPU core" if self.cores == 1 else f"{self.cores} CPU cores"
        return f"{cores}, {self.memory_bytes / GIB:.0f} GiB memory, {gpus}"


def find_machine() -> Machine:
    """Look at this machine; limits of a container count, hidden GPUs do not."""
    hierarchy, own = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
    groups = _own_groups(hierarchy, own.read_text()) if own.exists() else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    names, gpu_memory, fault = _gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
    return Machine(
        cores=min([cores, *(limit for group in groups if (limit := cpu_limit(group)) is not None)]),
        memory_bytes=min([_total_memory(), *(limit for group in groups if (limit := memory_limit(group)) is not None)]),
        gpus=names,
        gpu_memory_bytes=gpu_memory,
        gpu_fault=fault,
        environment=dict(os.environ),
    )


def cpu_limit(group: Path) -> int | None:
    """Whole cores a control group (version 2 or 1) allows, at least 1; None where it sets no limit."""
    if (group / "cpu.max").exists():
        quota, period = (group / "cpu.max").read_text().split()
    elif (group / "cpu.cfs_quota_us").exists():
        quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    else:
        return None
    return None if quota in ("max", "-1") else max(1, math.floor(int(quota) / int(period)))


def memory_limit(group: Path) -> int | None:
    """Bytes a control group (version 2 or 1) allows; None where it sets no limit."""
    for name in ("memory.max", "memory.limit_in_bytes"):
        if (group / name).exists():
            text = (group / name).read_text().strip()
            return None if text == "max" else int(text)
    return None


def parse_gpus(listing: str, visible: str | None) -> tuple[tuple[str, ...], int]:
    """Names of the visible GPUs and the memory of the smallest.

    Args:
        listing: a line a GPU, `index, uuid, name, MiB`.
        visible: CUDA_VISIBLE_DEVICES, or None where it is not set. What follows an unknown entry is hidden, as in CUDA.
    """
    rows = [[part.strip() for part in line.split(",")] for line in listing.splitlines() if line.strip()]
    if visible is not None:
        found = []
        for entry in (part.strip() for part in visible.split(",")):
            row = next((row for row in rows if entry == row[0] or (entry and row[1].startswith(entry))), None)
            if row is None:
                break
            found.append(row)
        rows = found
    return tuple(row[2] for row in rows), min((int(row[3]) * MIB for row in rows), default=0)


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gpus(visible: str | None) -> tuple[tuple[str, ...], int, str | None]:
    tool = shutil.which("nvidia-smi")
    if tool is None or visible == "":
        return (), 0, None
    command = [tool, "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return (), 0, f"nvidia-smi: {error}"
    if done.returncode != 0:
        # Images carry the tool to machines without a GPU.
        return (), 0, f"nvidia-smi: {' '.join((done.stdout or done.stderr).split())} (exit code {done.returncode})"
    names, memory = parse_gpus(done.stdout, visible)
    return names, memory, None


def _own_groups(hierarchy: Path, membership: str) -> list[Path]:
    """The control groups of this process and those above them, any of which may set the limit."""
    groups = [hierarchy, hierarchy / "cpu", hierarchy / "memory"]
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        root = hierarchy / controllers if controllers else hierarchy
        own = root / path.lstrip("/")
        groups += [own, *(parent for parent in own.parents if root in parent.parents)]
    return groups
