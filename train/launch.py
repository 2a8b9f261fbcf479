"""Starting ranks and watching over them. The driver's side; `train/worker.py` is the ranks'.

Two launchers run the same worker function. `gang` is ours: one Ray placement group with a bundle a node and one actor a
rank, so that tensor ranks share a node, order is ours to choose and a lost rank is known at once. `ray_train` is Ray
Train's TorchTrainer, for whoever already operates it.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from conf.errors import UserError
from conf.schema import ClusterConfig
from train.rundir import RunDir
from train.worker import Failure, Place, RankOutcome, run_rank

POLL_SECONDS = 0.25
PLACEMENT_SECONDS = 120.0
ANSWER_SECONDS = 10.0
# After the first failure the others get this long to tell theirs; the one that came first is shown.
GRACE_SECONDS = 2.0
OBJECT_STORE_BYTES = 80 * 2**20


class RankError(Exception):
    """A rank died or raised.

    Attributes:
        rank: which one came first.
        reason: one line.
        details: its traceback, empty if it was killed.
        log: its log file.
    """

    def __init__(self, rank: int, reason: str, details: str, log: Path) -> None:
        self.rank, self.reason, self.details, self.log = rank, reason, details, log
        super().__init__(f"rank {rank}: {reason} (log: {log})")


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
    def world_size(self) -> int:
        """Number of ranks."""
        return self.cluster.num_nodes * self.ranks_per_node

    def __enter__(self) -> Self:
        """Join or start Ray, reserve the nodes and start one actor a rank.

        Raises:
            UserError: Ray cannot be reached, or the cluster has not what is asked for.
        """
        connect(self.cluster, self.world_size, use_gpu=self.use_gpu)
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

    def run(self, run: RunDir, entry: str, on_poll: Callable[[], None]) -> RankOutcome:
        """Let every rank run `entry` for a run directory; `on_poll` is called a few times a second.

        Raises:
            RankError: a rank died or raised; all others have been ended.
        """
        import ray

        master = self._seats[0]
        port = ray.get(master.actor.host_store.remote())
        futures = {
            seat.actor.run.remote(self._place(rank, master.address, port), str(run.path), entry): rank
            for rank, seat in enumerate(self._seats)
        }
        outcomes: list[RankOutcome] = []
        pending = list(futures)
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=POLL_SECONDS)
            for future in done:
                try:
                    outcomes.append(ray.get(future))
                except Exception as error:
                    raise self._first_failure(run, {futures[future]: error}, pending, futures) from None
            on_poll()
        return "stopped" if "stopped" in outcomes else "finished"

    def close(self) -> None:
        """End every rank, give the nodes back, leave Ray."""
        import ray

        for seat in self._seats:
            ray.kill(seat.actor)
        self._seats = []
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

    def _place(self, rank: int, address: str, port: int) -> Place:
        return Place(
            rank=rank,
            world_size=self.world_size,
            local_rank=rank % self.ranks_per_node,
            ranks_on_node=self.ranks_per_node,
            master_address=address,
            master_port=port,
        )

    def _first_failure(
        self, run: RunDir, errors: dict[int, Exception], pending: list[Any], futures: dict[Any, int]
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
        for seat in self._seats:
            ray.kill(seat.actor)
        self._seats = []
        return first_failure(run, errors)


class RayTrain:
    """The same work under Ray Train's TorchTrainer; a new group of workers for every run.

    Args:
        cluster: where; `ranks_per_node` is resolved.
        use_gpu: one GPU a rank, else CPU ranks.
    """

    def __init__(self, cluster: ClusterConfig, *, use_gpu: bool) -> None:
        assert cluster.ranks_per_node is not None, "the cluster is resolved before launch"
        self.cluster = cluster
        self.world_size = cluster.num_nodes * cluster.ranks_per_node
        self.use_gpu = use_gpu

    def __enter__(self) -> Self:
        """Join or start Ray."""
        connect(self.cluster, self.world_size, use_gpu=self.use_gpu)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave Ray."""
        import ray

        ray.shutdown()

    def run(self, run: RunDir, entry: str, on_poll: Callable[[], None]) -> RankOutcome:
        """Let every rank run `entry` for a run directory; `on_poll` is called a few times a second.

        Raises:
            RankError: a rank died or raised.
        """
        trainer = self._trainer(run, entry)
        errors: list[Exception] = []

        def fit() -> None:
            try:
                trainer.fit()
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=fit, name="ray-train")
        thread.start()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            on_poll()
        if errors:
            raise first_failure(run, getattr(errors[0], "worker_failures", None) or {0: errors[0]}) from None
        return "stopped" if run.stop_file.exists() else "finished"

    def _trainer(self, run: RunDir, entry: str) -> Any:
        from ray.train import FailureConfig, ScalingConfig
        from ray.train import RunConfig as RayRunConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        return TorchTrainer(
            _ray_train_worker,
            train_loop_config={"run_dir": str(run.path), "entry": entry},
            scaling_config=ScalingConfig(
                num_workers=self.world_size,
                use_gpu=self.use_gpu,
                resources_per_worker={"CPU": 1} | ({"GPU": 1} if self.use_gpu else {}),
            ),
            torch_config=TorchConfig(backend="nccl" if self.use_gpu else "gloo"),
            run_config=RayRunConfig(
                name="ray_train",
                storage_path=str(run.path),
                # Restarting is ours, from our own checkpoints.
                failure_config=FailureConfig(max_failures=0),
            ),
        )


class _RankActor:
    """One rank's process."""

    def where(self) -> tuple[str, str]:
        """Node id and the address other nodes reach it by; what every run needs is imported while others start."""
        import ray

        threading.Thread(target=_warm_up, daemon=True).start()
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()

    def host_store(self) -> int:
        """Serve the store the ranks of the next run meet at; returns its port, which is held from now on."""
        from parallel import groups

        self.store = groups.host_store()
        port: int = self.store.port
        return port

    def run(self, place: Place, run_dir: str, entry: str) -> RankOutcome:
        """See `train.worker.run_rank`."""
        return run_rank(place, run_dir, entry, self.store if place.rank == 0 else None)


def _warm_up() -> None:
    import parallel.groups  # noqa: F401


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
    import ray

    try:
        if cluster.kind == "ray":
            _require_answer(cluster.address or "auto")
            ray.init(address=cluster.address or "auto", log_to_driver=False, logging_level="error")
        else:
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
    except (ConnectionError, TimeoutError, RuntimeError, ValueError, OSError) as error:
        target = f"the Ray cluster at {cluster.address}" if cluster.kind == "ray" else "a Ray on this machine"
        raise UserError(f"cannot use {target}: {type(error).__name__}: {error}") from error


def _ray_train_worker(loop: dict[str, str]) -> None:
    import ray.train

    context = ray.train.get_context()
    place = Place(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        ranks_on_node=context.get_local_world_size(),
        master_address="",
        master_port=0,
    )
    run_rank(place, loop["run_dir"], loop["entry"], None)


def first_failure(run: RunDir, errors: Mapping[int, Exception]) -> RankError:
    """The rank whose end caused the others': one that was killed, else the first that raised."""
    from ray.exceptions import RayActorError

    told = [Failure(**json.loads(file.read_text())) for file in run.failures.glob("rank-*.json")]
    killed = sorted(rank for rank, error in errors.items() if isinstance(error, RayActorError))
    if killed:
        reason = "its process was killed (SIGKILL, out of memory, or its node was lost): " + " ".join(
            str(errors[killed[0]]).split()
        )
        return RankError(killed[0], reason[:600], "", run.rank_log(killed[0]))
    if told:
        first = min(told, key=lambda failure: failure.time)
        return RankError(first.rank, first.error, first.traceback, run.rank_log(first.rank))
    rank, error = min(errors.items())
    return RankError(rank, type(error).__name__, str(error), run.rank_log(rank))


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
