"""What the training loop adds to the engine, and whether memory grows: `python -m bench.overhead [OVERRIDE...]`.

One process takes a recipe's steps through the training loop (data, metrics, schedule, stop file), and the time inside
`engine.step` is taken apart from the rest. Then a tiny model takes a thousand steps, and what the process holds after
them is set beside what it held after the first two hundred. Validation and checkpoints are left out; W&B is a process
of its own, which only reads `metrics.jsonl`.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from conf import load
from conf.schema import PretrainStage, RunConfig
from data.shards import Dataset
from parallel import groups
from parallel.engine import StepResult, make_engine
from parallel.initial import InitialWeights
from parallel.mesh import Mesh
from recipes.check import resolve
from recipes.driver import prepare_sources
from recipes.machine import find_machine
from recipes.pretrain import StageInput
from recipes.stage import tokenizer_identity
from train import rundir
from train.checkpoint import Provenance
from train.loop import StageJob, TrainingLoop
from train.worker import Place, RankContext

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
ONE_RANK = ["engine.mesh.data=1", "cluster.ranks_per_node=1", "tracking=none"]
TINY = ["model.num_layers=1", "model.hidden_size=32", "model.ffn_hidden_size=32", "model.num_attention_heads=2"]
TINY += ["model.num_kv_heads=1", "model.head_dim=16"]
WARM_UP_STEPS = 200


class TimedEngine:
    """An engine that writes down how long its steps take."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.seconds: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def step(self, *args: Any, **options: Any) -> StepResult:
        """The engine's step."""
        started = time.perf_counter()
        result: StepResult = self.engine.step(*args, **options)
        self.seconds.append(time.perf_counter() - started)
        return result


class WatchedLoop(TrainingLoop):
    """The loop without validation and checkpoints, noting time and memory after every step."""

    ends: list[float]
    held: list[tuple[int, int]]
    losses: list[float]

    def record_step(self, completed: int, rate: float, result: StepResult, *, seconds: float, length: float) -> None:
        """Write the step down as ever, then look."""
        super().record_step(completed, rate, result, seconds=seconds, length=length)
        self.ends.append(time.perf_counter())
        self.losses.append(result.loss)
        if completed % WARM_UP_STEPS == 0:
            gc.collect()
            self.held.append((resident_bytes(), len(gc.get_objects())))

    def validate(self, step: int) -> None:
        """Left out."""

    def save(self, step: int) -> None:
        """Left out."""


def resident_bytes() -> int:
    """Memory this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What was seen of a run.

    Attributes:
        inside: seconds of each step within the engine.
        whole: seconds from the end of a step to the end of the next.
        held: bytes and Python objects held after every 200 steps.
        losses: of each step, nats.
    """

    inside: list[float]
    whole: list[float]
    held: list[tuple[int, int]]
    losses: list[float]


def run(config: RunConfig, num_steps: int, directory: Path) -> Watched:
    """Train the recipe's first stage for some steps."""
    name = config.order[0]
    stage = config.stages[name]
    assert isinstance(stage, PretrainStage), "the recipe begins with pretraining"
    training = replace(stage.training, tokens=num_steps * stage.training.tokens_per_step)
    mesh = config.engine.mesh
    place = Place(rank=0, world_size=1, local_rank=0, ranks_on_node=1, master_address="localhost", master_port=0)
    context = RankContext(place=place, config=config, run=rundir.create(directory, config.name))
    datasets = {name: Dataset.open(path) for name, path in prepare_sources(config).items()}
    given = StageInput(context=context, name=name, incoming=None, datasets=datasets)
    one = Mesh(pipeline=mesh.pipeline, data=1, context=mesh.context, tensor=mesh.tensor)
    engine = TimedEngine(
        make_engine(config.model, config.engine, training.optim, one, micro_batch=training.micro_batch)
    )
    provenance = Provenance(
        run=context.run.name,
        recipe=config.name,
        stage=given.name,
        model=config.model,
        engine=config.engine,
        tokenizer=tokenizer_identity(datasets),
        data={source: datasets[source].identity for source in training.mixture},
        parents=(),
    )
    job = StageJob(
        name=name, kind=stage.kind, model=config.model, training=training, datasets=datasets, provenance=provenance
    )
    loop = WatchedLoop(context, job, engine, InitialWeights(config.model, config.seed))
    loop.ends, loop.held, loop.losses = [], [], []
    loop.run()
    engine.close()
    whole = [end - start for start, end in zip(loop.ends, loop.ends[1:], strict=False)]
    return Watched(inside=engine.seconds, whole=whole, held=loop.held, losses=loop.losses)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__)
    parser.add_argument("override", nargs="*", default=["recipe=foundation"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--many", type=int, default=1000)
    given = parser.parse_args(arguments)
    groups.open_world(groups.host_store(), rank=0, world_size=1)
    groups.enter_mesh(Mesh())
    torch.set_num_threads(1)  # the prefetching thread has a core of its own

    def composed(*more: str) -> RunConfig:
        return resolve(load.compose([*given.override, *ONE_RANK, *more]), find_machine())

    with tempfile.TemporaryDirectory() as directory:
        seen = run(composed(), given.steps, Path(directory))
        inside, whole = seen.inside, seen.whole
        shares = [(each - engine) / engine for each, engine in zip(whole[2:], inside[3:], strict=True)]
        print(f"step within the engine, median {1e3 * statistics.median(inside[3:]):.1f} ms")
        print(f"the loop adds, median {100 * statistics.median(shares):.3f} % of a step")
        print(f"the loop adds, all steps together {100 * (sum(whole[2:]) / sum(inside[3:]) - 1):.3f} %")
        held = run(composed(*TINY), given.many, Path(directory)).held
        for (num_bytes, num_objects), number in zip(
            held, range(WARM_UP_STEPS, given.many + 1, WARM_UP_STEPS), strict=True
        ):
            print(f"after {number} steps {num_bytes / 2**20:.1f} MiB resident, {num_objects} Python objects")
    groups.shut_down()


if __name__ == "__main__":
    main()
