"""The same work under Ray Train's TorchTrainer, for whoever already operates it: one world, a place for every rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from conf.schema import ClusterConfig
from train.launch import POLL_SECONDS, Who, connect, first_failure
from train.rundir import RunDir
from train.worker import Place, RankOutcome, World, run_rank


class RayTrain:
    """A new group of workers for every run.

    Args:
        cluster: where; `ranks_per_node` is resolved.
        use_gpu: one GPU a rank, else CPU ranks.
    """

    def __init__(self, cluster: ClusterConfig, *, use_gpu: bool) -> None:
        assert cluster.ranks_per_node is not None, "the cluster is resolved before launch"
        self.cluster = cluster
        self.num_ranks = cluster.num_nodes * cluster.ranks_per_node
        self.use_gpu = use_gpu

    def __enter__(self) -> Self:
        """Join or start Ray."""
        connect(self.cluster, self.num_ranks, use_gpu=self.use_gpu)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave Ray."""
        import ray

        ray.shutdown()

    def run(self, run: RunDir, worlds: Sequence[World], on_poll: Callable[[], None]) -> RankOutcome:
        """Let a world work on a run directory; `on_poll` is called a few times a second.

        Raises:
            RankError: a rank died or raised.
        """
        (world,) = worlds
        trainer = self._trainer(run, world.entry)
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
            failures = getattr(errors[0], "worker_failures", None) or {0: errors[0]}
            raise first_failure(run, {Who(world.name, rank): error for rank, error in failures.items()}) from None
        return "stopped" if run.stop_file.exists() else "finished"

    def _trainer(self, run: RunDir, entry: str) -> Any:
        from ray.train import FailureConfig, ScalingConfig
        from ray.train import RunConfig as RayRunConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        return TorchTrainer(
            _ray_train_worker,
            train_loop_config={"run_dir": str(run.path), "entry": entry},
            scaling_config=ScalingConfig(
                num_workers=self.num_ranks,
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
