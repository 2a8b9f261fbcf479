"""Starting ranks and watching over them. The driver's side; `train/worker.py` is the ranks'.

Two launchers run the same worker function. `gang` is ours: one Ray placement group with a bundle a node and one actor a
rank, so that tensor ranks share a node, order is ours to choose and a lost rank is known at once. The other is in
`train/ray_train.py`.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from conf.errors import UserError
from conf.schema import ClusterConfig
from train.rundir import RunDir
from train.worker import Failure, Place, RankOutcome, World, run_rank

POLL_SECONDS = 0.25
PLACEMENT_SECONDS = 120.0
ANSWER_SECONDS = 10.0
# After the first failure the others get this long to tell theirs; the one that came first is shown.
GRACE_SECONDS = 2.0
OBJECT_STORE_BYTES = 80 * 2**20
RAY_STARTS = 2
"""Ray gives its parts 30 s to come up, which a busy machine may not manage before it has read them all once."""


class Who(NamedTuple):
    """A rank among those of all worlds."""

    world: str
    rank: int


class RankError(Exception):
    """A rank died or raised.

    Attributes:
        who: which one came first, e.g. `rank 3`.
        reason: one line.
        details: its traceback, empty if it was killed.
        log: its log file.
    """

    def __init__(self, who: Who, reason: str, details: str, log: Path) -> None:
        self.who, self.reason, self.details, self.log = f"{who.world} {who.rank}", reason, details, log
        super().__init__(f"{self.who}: {reason} (log: {log})")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seat:
    """A rank's actor and the node it sits on."""

    actor: Any
    node: str
    address: str


class Gang:
    """The processes of a run: started once, given work several times (a recipe and the one it starts from).

    Args:
        cluster: where; `ranks_per_node` is resolved.
        use_gpu: one GPU a rank, else CPU ranks.
        node_order: addresses of nodes in the order they get ranks; others come after them, by address.
    """

    def __init__(self, cluster: ClusterConfig, *, use_gpu: bool, node_order: Sequence[str] = ()) -> None:
        assert cluster.ranks_per_node is not None, "the cluster is resolved before launch"
        self.cluster = cluster
        self.ranks_per_node = cluster.ranks_per_node
        self.use_gpu = use_gpu
        self.node_order = {address: position for position, address in enumerate(node_order)}
        self._group: Any = None
        self._seats: list[_Seat] = []

    @property
    def num_ranks(self) -> int:
        """Number of ranks, of all worlds together."""
        return self.cluster.num_nodes * self.ranks_per_node

    def __enter__(self) -> Self:
        """Join or start Ray, reserve the nodes and start one actor a rank.

        Raises:
            UserError: Ray cannot be reached, or the cluster has not what is asked for.
        """
        connect(self.cluster, self.num_ranks, use_gpu=self.use_gpu)
        try:
            self._reserve()
            self._seat()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every rank and give the nodes back."""
        self.close()

    def run(self, run: RunDir, worlds: Sequence[World], on_poll: Callable[[], None]) -> RankOutcome:
        """Let worlds work on a run directory; `on_poll` is called a few times a second.

        The worlds take the gang's ranks one after another. When the first has ended, the ranks of the others are ended:
        they hold nothing that is not had again.

        Raises:
            RankError: a rank died or raised; all others have been ended.
        """
        import ray

        master = self._seats[0]
        port = ray.get(master.actor.host_store.remote())
        futures: dict[Any, Who] = {}
        for world, rank, number in _numbered(worlds):
            seat = self._seats[number]
            place = Place(
                rank=rank,
                world_size=world.size,
                local_rank=number % self.ranks_per_node,
                ranks_on_node=self.ranks_per_node,
                master_address=master.address,
                master_port=port,
                address=seat.address,
                world=world.name,
                engine=world.engine,
            )
            futures[seat.actor.run.remote(place, str(run.path), world.entry)] = Who(world.name, rank)
        outcomes: dict[Who, RankOutcome] = {}
        pending = list(futures)
        while any(futures[future].world == worlds[0].name for future in pending):
            done, pending = ray.wait(pending, num_returns=1, timeout=POLL_SECONDS)
            for future in done:
                try:
                    outcomes[futures[future]] = ray.get(future)
                except Exception as error:
                    raise self._first_failure(run, {futures[future]: error}, pending, futures) from None
            on_poll()
        if len(worlds) > 1:
            self._end(worlds[0].size)
        return "stopped" if "stopped" in outcomes.values() else "finished"

    def close(self) -> None:
        """End every rank, give the nodes back, leave Ray."""
        import ray

        self._end()
        if self._group is not None:
            ray.util.remove_placement_group(self._group)
            self._group = None
        ray.shutdown()

    def _reserve(self) -> None:
        import ray
        from ray.util.placement_group import placement_group

        bundle = {"CPU": float(self.ranks_per_node)} | ({"GPU": float(self.ranks_per_node)} if self.use_gpu else {})
        nodes = self.cluster.num_nodes
        self._group = placement_group(
            [bundle] * nodes,
            strategy="STRICT_SPREAD" if nodes > 1 else "PACK",
            bundle_label_selector=[self.cluster.node_labels] * nodes if self.cluster.node_labels else None,
        )
        try:
            ray.get(self._group.ready(), timeout=PLACEMENT_SECONDS)
        except ray.exceptions.GetTimeoutError:
            labels = f" with labels {self.cluster.node_labels}" if self.cluster.node_labels else ""
            raise UserError(
                f"the Ray cluster did not give {nodes} nodes with {bundle} each{labels} within "
                f"{PLACEMENT_SECONDS:.0f} s; it has in all {ray.cluster_resources()}. "
                "Lower cluster.num_nodes or cluster.ranks_per_node, or add nodes."
            ) from None

    def _seat(self) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        actor_type = ray.remote(_RankActor)
        actors = [
            actor_type.options(
                num_cpus=1,
                num_gpus=1 if self.use_gpu else 0,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle),
            ).remote()
            for bundle in range(self.cluster.num_nodes)
            for _ in range(self.ranks_per_node)
        ]
        where = ray.get([actor.where.remote() for actor in actors])
        seats = [
            _Seat(actor=actor, node=node, address=address) for actor, (node, address) in zip(actors, where, strict=True)
        ]
        # Bundles come in no particular order; ranks of a node stay together and nodes go by the order given and by
        # address, so that a restart on the same nodes gives every rank its old place.
        last = len(self.node_order)
        self._seats = sorted(
            seats, key=lambda seat: (self.node_order.get(seat.address, last), _address_key(seat.address), seat.node)
        )

    def _end(self, first: int = 0) -> None:
        """End the ranks from this number on."""
        import ray

        for seat in self._seats[first:]:
            ray.kill(seat.actor)
        self._seats = self._seats[:first]

    def _first_failure(
        self, run: RunDir, errors: dict[Who, Exception], pending: list[Any], futures: dict[Any, Who]
    ) -> RankError:
        """Wait a moment for the others' failures, end everybody, and name the rank that came first."""
        import ray

        deadline = time.monotonic() + GRACE_SECONDS
        while pending and time.monotonic() < deadline:
            done, pending = ray.wait(pending, num_returns=1, timeout=POLL_SECONDS)
            for future in done:
                try:
                    ray.get(future)
                except Exception as error:
                    errors[futures[future]] = error
        self._end()
        return first_failure(run, errors)


class _RankActor:
    """One rank's process."""

    def __init__(self) -> None:
        self.store: Any = None

    def where(self) -> tuple[str, str]:
        """Node id and the address other nodes reach it by; what every run needs is imported while others start."""
        import ray

        threading.Thread(target=_warm_up, daemon=True).start()
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()

    def host_store(self) -> int:
        """Serve the store the ranks of the next run meet at; returns its port, which is held from now on."""
        _warm_up()
        from parallel import groups

        self.store = groups.host_store()
        port: int = self.store.port
        return port

    def run(self, place: Place, run_dir: str, entry: str) -> RankOutcome:
        """See `train.worker.run_rank`."""
        return run_rank(place, run_dir, entry, self.store)


def _warm_up() -> None:
    from parallel.imports import import_framework

    import_framework()


def _start_ray(world_size: int, *, use_gpu: bool) -> None:
    import ray

    for start in range(1, RAY_STARTS + 1):
        try:
            # "local" starts a new one: a cluster that happens to run on this host is not ours.
            ray.init(
                address="local",
                num_cpus=world_size,  # Ray starts a worker for each, needed or not
                num_gpus=world_size if use_gpu else 0,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level="error",
            )
            return
        except Exception as error:
            ray.shutdown()
            if "timed out during startup" not in str(error) or start == RAY_STARTS:
                raise


def connect(cluster: ClusterConfig, world_size: int, *, use_gpu: bool) -> None:
    """Start a private Ray for this run, or join the cluster's.

    Raises:
        UserError: Ray does not start, or the cluster at `cluster.address` does not answer.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    if cluster.kind == "local":
        # Keeps other users of the machine from submitting code to our ranks. Ray reads it when it is imported.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=_own_token())
        # OpenMP reads it when a rank starts. Threads that spin while they wait keep cores from those they wait for:
        # where others use this machine as well, products of matrices took five times as long.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import ray

    try:
        if cluster.kind == "ray":
            _require_answer(cluster.address or "auto")
            ray.init(address=cluster.address or "auto", log_to_driver=False, logging_level="error")
        else:
            _start_ray(world_size, use_gpu=use_gpu)
    except Exception as error:  # a bare one where parts of Ray do not come up
        target = f"the Ray cluster at {cluster.address}" if cluster.kind == "ray" else "a Ray on this machine"
        raise UserError(f"cannot use {target}: {type(error).__name__}: {error}") from error


def first_failure(run: RunDir, errors: Mapping[Who, Exception]) -> RankError:
    """The rank whose end caused the others': one that was killed, else the first that raised."""
    from ray.exceptions import RayActorError

    told = [Failure(**json.loads(file.read_text())) for file in run.failures.glob("*.json")]
    killed = sorted(who for who, error in errors.items() if isinstance(error, RayActorError))
    if killed:
        reason = "its process was killed (SIGKILL, out of memory, or its node was lost): " + " ".join(
            str(errors[killed[0]]).split()
        )
        return RankError(killed[0], reason[:600], "", run.rank_log(killed[0].rank, killed[0].world))
    if told:
        first = min(told, key=lambda failure: failure.time)
        return RankError(
            Who(first.world, first.rank), first.error, first.traceback, run.rank_log(first.rank, first.world)
        )
    who, error = min(errors.items())
    return RankError(who, type(error).__name__, str(error), run.rank_log(who.rank, who.world))


def _numbered(worlds: Sequence[World]) -> Iterator[tuple[World, int, int]]:
    """Each rank of each world, with its number among all."""
    places = [(world, rank) for world in worlds for rank in range(world.size)]
    return ((world, rank, number) for number, (world, rank) in enumerate(places))


def _require_answer(address: str) -> None:
    """Ray itself tries for minutes before it says that nobody is there.

    Raises:
        OSError: nobody listens at `HOST:PORT`; addresses of another form are Ray's to find.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()


@functools.cache
def _own_token() -> str:
    """One for the life of the process, because Ray keeps the first it was given; the jobs of a sweep share it."""
    return secrets.token_hex(32)


def _address_key(address: str) -> tuple[int, ...] | tuple[str]:
    parts = address.split(".")
    return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else (address,)
