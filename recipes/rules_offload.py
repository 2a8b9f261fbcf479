"""Rules about the local disk that optimizer state is offloaded to.

Disks of other nodes cannot be seen before launch: there the engine says so when it takes its space, before it trains.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from conf.errors import Problem
from conf.schema import RunConfig
from recipes.fit import fullest_of
from recipes.machine import Machine
from train.quantities import byte_size

PATH = "engine.offload_directory"
IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
OVER_A_NETWORK = (
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "cifs",
    "smb3",
    "9p",
    "afs",
    "fuse.sshfs",
    "wekafs",
)


def directory_holds_optimizer_state(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """It is there, can be written to, and has the space that all ranks of this machine take."""
    directory = _directory(config)
    if directory is None or config.cluster.kind != "local":
        return
    if not directory.is_dir():
        yield Problem(PATH, f"is {directory}, which is no directory. Make it, or name one of a local disk.")
        return
    if not os.access(directory, os.W_OK | os.X_OK):
        yield Problem(PATH, f"is {directory}, which cannot be written by this user. Set {PATH}=DIR.")
        return
    fullest, ranks = fullest_of(config), config.cluster.ranks_per_node
    assert ranks is not None, "rules are asked of resolved configurations"
    if fullest is None:
        return
    each, free = fullest[1].disk_optimizer, machine.free_disk_bytes(directory)
    if ranks * each > free:
        yield Problem(
            PATH,
            f"{directory} has {byte_size(free)} free, and masters and moments of {ranks} ranks of this machine take "
            f"{byte_size(ranks * each)} ({byte_size(each)} each, 12 bytes a parameter that a rank updates). "
            "Free space, name a directory of another disk, or use more data ranks, which share the state.",
        )


def directory_is_on_a_local_disk(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Memory saves no memory, and a network is slower than a disk and shared with other nodes."""
    directory = _directory(config)
    if directory is None or config.cluster.kind != "local" or not directory.is_dir():
        return
    kind = machine.file_system_of(directory)
    if kind in IN_MEMORY:
        yield Problem(
            PATH,
            f"is {directory}, a {kind}: it is memory itself, so that nothing is saved by it. "
            "Name a directory of a local disk, or set engine.offload_optimizer=cpu.",
        )
    elif kind in OVER_A_NETWORK:
        yield Problem(
            PATH,
            f"is {directory}, on {kind}: all of it is read and written in every step, over a network that other nodes "
            "share. Name a directory of a local disk.",
        )


def _directory(config: RunConfig) -> Path | None:
    engine = config.engine
    if engine.offload_optimizer != "nvme" or engine.offload_directory is None:
        return None
    return Path(engine.offload_directory).expanduser()


RULES = (directory_holds_optimizer_state,)
WARNINGS = (directory_is_on_a_local_disk,)
