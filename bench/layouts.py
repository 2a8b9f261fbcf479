"""Every combination of axes that the rules allow, over 20 steps in float32, against one rank.

Axes have size 1 or 2, up to three of them at once (eight ranks), under both engines, at every ZeRO stage, dense and
with experts. Options (recomputation, offloading, overlap, sequence parallelism) take turns over the combinations.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from bench.settings import OPTIM, dense_model, engine_of
from conf import load
from conf.schema import EngineConfig, ExpertsConfig, ModelConfig, RunConfig
from data.batch import Batch
from parallel import groups, offload
from parallel.engine import make_engine
from parallel.initial import InitialWeights
from parallel.loss import CrossEntropy
from parallel.mesh import Mesh
from recipes import rules_engine, rules_experts
from recipes.machine import Machine

NUM_STEPS = 20
TOLERANCE = 1e-5
ROWS, MICRO_BATCH, LENGTH, VOCABULARY = 8, 2, 32, 256
LEARNING_RATE = 3e-3
DENSE = dense_model(
    name="tiny",
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=160,
    num_attention_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=VOCABULARY,
    max_sequence_length=LENGTH,
)
EXPERTS = replace(
    DENSE,
    name="tiny-experts",
    ffn_hidden_size=48,
    init_std=0.1,
    experts=ExpertsConfig(
        num_experts=4, num_experts_per_token=2, balance_loss=0.05, router_z_loss=0.01, capacity_factor=None
    ),
)
ONE_RANK = engine_of()
NOBODY = Machine(cores=1, memory_bytes=0)
RULES = (*rules_engine.RULES, *rules_experts.RULES)


@dataclass(frozen=True, slots=True)
class Case:
    """One run."""

    model: ModelConfig
    engine: EngineConfig

    @property
    def mesh(self) -> Mesh:
        """The axes."""
        mesh = self.engine.mesh
        assert mesh.data is not None
        return Mesh(
            tensor=mesh.tensor, context=mesh.context, pipeline=mesh.pipeline, data=mesh.data, expert=mesh.expert
        )

    def __str__(self) -> str:
        engine, mesh = self.engine, self.engine.mesh
        axes = ("tensor", "context", "pipeline", "data", "expert")
        named = [axis for axis in axes if getattr(mesh, axis) > 1]
        named += ["interleaved"] if mesh.virtual_pipeline > 1 else []
        options = [f"ZeRO {engine.zero_stage}"]
        options += ["sequence parallel"] if engine.sequence_parallel else []
        options += [f"recompute {engine.recompute}"] if engine.recompute != "none" else []
        options += [f"offload {engine.offload_optimizer}"] if engine.offload_optimizer != "none" else []
        options += ["offload activations"] if engine.offload_activations else []
        options += ["overlap"] if engine.overlap else []
        return f"{engine.backend} | {' x '.join(named) or 'one rank'} | {', '.join(options)}"


def cases(num_ranks: int) -> list[Case]:
    """The combinations on so many ranks that the rules allow, but for the one that is compared with."""
    config = load.compose(["recipe=foundation"])
    allowed = [
        case
        for case in _products(num_ranks)
        if not any(problem for rule in RULES for problem in rule(_configured(config, case), NOBODY))
    ]
    return [case for case in dict.fromkeys(allowed) if case.engine != ONE_RANK]


def _products(num_ranks: int) -> Iterator[Case]:
    turn = itertools.count()
    for sizes in itertools.product((1, 2), repeat=4):
        if np.prod(sizes) != num_ranks:
            continue
        tensor, context, pipeline, data = sizes
        for backend, zero_stage, virtual, expert in itertools.product(
            ("megatron", "deepspeed"),
            (0, 1, 2, 3),
            (1, 2) if pipeline > 1 else (1,),
            (0, 2) if data * context > 1 else (0, 1),
        ):
            number = next(turn)
            offloads = ("none", "cpu", "nvme") if backend == "deepspeed" and zero_stage and pipeline == 1 else ("none",)
            where = offloads[number % len(offloads)]
            yield Case(
                EXPERTS if expert else DENSE,
                engine_of(
                    mesh={
                        "tensor": tensor,
                        "context": context,
                        "pipeline": pipeline,
                        "data": data,
                        "virtual_pipeline": virtual,
                        "expert": max(1, expert),
                    },
                    backend=backend,
                    zero_stage=zero_stage,
                    sequence_parallel=tensor > 1 and (expert > 0 or number % 3 > 0),
                    recompute=("none", "selective", "full")[number // 2 % 3],
                    offload_activations=number // 3 % 2 == 1,
                    overlap=number // 5 % 2 == 0,
                    offload_optimizer=where,
                    offload_directory=tempfile.gettempdir() if where == "nvme" else None,
                ),
            )


def _configured(config: RunConfig, case: Case) -> RunConfig:
    return replace(config, model=case.model, engine=case.engine)


def batches(step: int, mesh: Mesh, data_rank: int) -> list[Batch]:
    """A data rank's micro-batches of a step: the next token is 3 t + 7, one in ten is another."""
    random = np.random.default_rng([7, step])
    rows = np.empty((ROWS, LENGTH + 1), dtype=np.int64)
    rows[:, 0] = random.integers(VOCABULARY, size=ROWS)
    for place in range(LENGTH):
        noise, is_noise = random.integers(VOCABULARY, size=ROWS), random.random(ROWS) < 0.1
        rows[:, place + 1] = np.where(is_noise, noise, (3 * rows[:, place] + 7) % VOCABULARY)
    counted = (random.random((ROWS, LENGTH)) < random.random((ROWS, 1))).astype(np.float32)
    mine = ROWS // mesh.data
    return [
        Batch(
            tokens_BS=rows[at : at + MICRO_BATCH, :-1],
            labels_BS=rows[at : at + MICRO_BATCH, 1:],
            loss_mask_BS=counted[at : at + MICRO_BATCH],
            position_ids_BS=np.tile(np.arange(LENGTH), (MICRO_BATCH, 1)),
            sample_ids_B=np.arange(at, at + MICRO_BATCH),
        )
        for at in range(mine * data_rank, mine * data_rank + mine, MICRO_BATCH)
    ]


def losses_of(case: Case) -> list[float]:
    """The loss of each step."""
    groups.enter_mesh(case.mesh, virtual_pipeline=case.engine.mesh.virtual_pipeline)
    engine = make_engine(case.model, case.engine, OPTIM, case.mesh, micro_batch=MICRO_BATCH)
    engine.load_weights(InitialWeights(case.model, 1))
    losses = [
        engine.step(
            batches(step, case.mesh, engine.coordinate.data),
            CrossEntropy(z_loss=1e-4),
            learning_rate=LEARNING_RATE * min(step + 1, NUM_STEPS - step) / 10,
        ).loss
        for step in range(NUM_STEPS)
    ]
    engine.close()
    groups.leave_mesh()
    return losses


def _be_rank(rank: int, world_size: int, port: int, given: Sequence[Case], results: Any) -> None:
    torch.set_num_threads(1)
    offload.SMALLEST_BYTES = 0  # nothing of a tiny model is large
    groups.open_world(groups.join_store("localhost", port), rank=rank, world_size=world_size)
    for case in given:
        start = time.perf_counter()
        losses = losses_of(case)
        if rank == 0:
            results.put((losses, time.perf_counter() - start))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def curves(num_ranks: int, given: Sequence[Case]) -> Iterator[tuple[list[float], float]]:
    """Losses and seconds of each case, in new processes; ends where one of them does."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["parallel.deepspeed"])
    store, results = groups.host_store(), context.Queue()
    ranks = [
        context.Process(target=_be_rank, args=(rank, num_ranks, store.port, given, results), daemon=True)
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    for _ in given:
        while results.empty():
            if any(process.exitcode for process in ranks):
                raise SystemExit("a rank failed")
            time.sleep(0.05)
        yield results.get()
    for process in ranks:
        process.join()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.layouts", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4, 8], choices=[1, 2, 4, 8])
    parser.add_argument("--part", default="1/1", help="I/N: the Ith of N parts, in which every Nth case is")
    given = parser.parse_args(arguments)
    part, parts = map(int, given.part.split("/"))
    models = (DENSE, EXPERTS)
    alone = curves(1, [Case(model, ONE_RANK) for model in models])
    of_one = {model.name: losses for model, (losses, _) in zip(models, alone, strict=True)}
    print("| model | engine | axes | options | largest loss difference | seconds |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    worst, count = 0.0, 0
    for num_ranks in given.ranks:
        chosen = cases(num_ranks)[part - 1 :: parts]
        for case, (losses, seconds) in zip(chosen, curves(num_ranks, chosen), strict=True):
            one = of_one[case.model.name]
            difference = max(abs(mine - its) for mine, its in zip(losses, one, strict=True))
            worst, count = max(worst, difference), count + 1
            print(f"| {case.model.name} | {case} | {difference:.1e} | {seconds:.1f} |", flush=True)
    print(f"{count} combinations, {NUM_STEPS} steps each: largest difference {worst:.1e}, allowed {TOLERANCE:.0e}")
    if worst > TOLERANCE:
        raise SystemExit("not the same curve")


if __name__ == "__main__":
    main()
