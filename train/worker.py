"""What one rank does between being started and the first line of a stage: its environment, log, config and groups."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from conf import load
from conf.schema import EngineConfig, RunConfig
from train.rundir import RunDir, replace_text

if TYPE_CHECKING:
    from torch.distributed import Store

RankOutcome = Literal["finished", "stopped"]


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Ranks that share a mesh, numbered from 0. A run has one that trains; others help it and end with it.

    Attributes:
        name: of each of its ranks, on the screen, in logs and failures.
        entry: what they run, "module:function", taking a RankContext.
        size: how many there are.
        engine: how their model is spread; None: as the run's configuration says.
    """

    name: str
    entry: str
    size: int
    engine: EngineConfig | None = None


TRAINING_WORLD = "rank"


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a rank runs and how it meets the others (which Ray Train arranges by itself).

    Attributes:
        rank: in its world.
        world_size: ranks of its world.
        local_rank: on its node.
        ranks_on_node: of all worlds.
        master_address: of the store that all worlds of a run meet at.
        master_port: of it.
        address: by which other nodes reach this rank.
        world: name of its world.
        engine: of its world, see `World`.
    """

    rank: int
    world_size: int
    local_rank: int
    ranks_on_node: int
    master_address: str
    master_port: int
    address: str = ""
    world: str = TRAINING_WORLD
    engine: EngineConfig | None = None

    @property
    def ranks_here(self) -> range:
        """Ranks of this world on this rank's node; a world may begin and end within a node."""
        first = self.rank - self.local_rank
        return range(max(0, first), min(self.world_size, first + self.ranks_on_node))


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why a rank ended early, as it saw it."""

    world: str
    rank: int
    time: float
    error: str
    traceback: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RankContext:
    """What every stage is given: who this rank is and what run it is part of."""

    place: Place
    config: RunConfig
    run: RunDir

    @property
    def is_first(self) -> bool:
        """Rank 0 of a world writes what is written once."""
        return self.place.rank == 0


def run_rank(place: Place, run_dir: str, entry: str, store: Store | None) -> RankOutcome:
    """Run `entry` ("module:function", taking a RankContext) as one rank of a run.

    Args:
        place: where this rank runs.
        run_dir: of the run.
        entry: what to run.
        store: the one this rank hosts, on rank 0; not used where there is a default process group already.

    A failure is written to the run's `failures/` before it is raised, so that the rank that caused it can be told
    from those that only lost their peer.
    """
    run = RunDir(Path(run_dir))
    _prepare_process(place, run)
    try:
        config = load.read(run.config_file)
        if place.engine is not None:
            config = replace(config, engine=place.engine)
        from parallel.imports import collect_garbage_of_work, import_framework

        import_framework()
        import torch
        from torch import distributed

        from parallel import groups
        from parallel.mesh import Mesh

        # Ray imports torch before we can say how many cores this rank may use.
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        mesh = config.engine.mesh
        assert mesh.data is not None, "the mesh is resolved before launch"
        if not distributed.is_initialized():
            store = store or groups.join_store(place.master_address, place.master_port)
            store = distributed.PrefixStore(place.world, store)
            groups.open_world(store, rank=place.rank, world_size=place.world_size)
        groups.enter_mesh(
            Mesh(
                pipeline=mesh.pipeline,
                data=mesh.data,
                context=mesh.context,
                tensor=mesh.tensor,
                expert=mesh.expert,
            ),
            virtual_pipeline=mesh.virtual_pipeline,
        )
        run_stages = _entry(entry)
        collect_garbage_of_work()
        outcome = run_stages(RankContext(place=place, config=config, run=run))
        groups.shut_down()
        return outcome
    except BaseException as error:
        record_failure(run, place, error)
        raise


def record_failure(run: RunDir, place: Place, error: BaseException) -> None:
    """Write why a rank failed; keeps the first record of the rank."""
    file = run.failures / f"{place.world}-{place.rank:05d}.json"
    if file.exists():
        return
    failure = Failure(
        world=place.world,
        rank=place.rank,
        time=time.time(),
        error=f"{type(error).__name__}: {error}",
        traceback="".join(traceback.format_exception(error)),
    )
    traceback.print_exception(error)
    try:
        replace_text(file, json.dumps(asdict(failure)))
    except OSError as problem:
        # A full disk may be the very reason: the traceback still reaches the log and the launcher.
        print(f"could not write {file}: {problem}", file=sys.stderr)


def _prepare_process(place: Place, run: RunDir) -> None:
    log = os.open(run.rank_log(place.rank, place.world), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.close(log)
    faulthandler.enable()
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the driver answers them by asking for a stop.
    # Ray Train calls from a thread of its own, where handlers cannot be set; its processes have their own group.
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    # Extensions that are compiled when first used: a build that was killed leaves a lock that would stop other runs.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(run.path / "torch_extensions"))
    cores = len(os.sched_getaffinity(0))
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_RANK=str(place.local_rank),
        LOCAL_WORLD_SIZE=str(place.ranks_on_node),
        OMP_NUM_THREADS=str(max(1, cores // place.ranks_on_node)),
    )
    print(
        f"-- {place.world} {place.rank} of {place.world_size} on {socket.gethostname()}, process {os.getpid()}",
        flush=True,
    )


def _entry(name: str) -> Callable[[RankContext], RankOutcome]:
    module, _, function = name.partition(":")
    entry: Callable[[RankContext], RankOutcome] = getattr(importlib.import_module(module), function)
    return entry
