"""Whether what a layout differs by is rounding: the same steps on two context ranks and on one, in 32 and in 64 bits.

The steps are those of a student that learns from its teacher's hidden states too, at a weight (0.5) at which float32
leaves more than 1e-5 between the two. In 64 bits the engine is told that a float is a double.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from bench.layouts import DENSE, LEARNING_RATE, MICRO_BATCH, batches
from bench.settings import OPTIM, engine_of
from parallel import adam, groups, hidden_states, megatron, model
from parallel.distillation import Distillation, FromTeacher
from parallel.engine import Match, make_engine
from parallel.initial import InitialWeights
from parallel.mesh import Mesh
from parallel.pruning import PrunedWeights, most_important

NUM_STEPS = 8
CALIBRATION = 500  # a step that is never trained on
TEACHER = replace(DENSE, rope_theta=10_000.0, init_std=0.2)
STUDENT = replace(TEACHER, num_layers=2, hidden_size=48, ffn_hidden_size=96, num_attention_heads=2, num_kv_heads=2)
PAIRS = {0: 1, 1: 3}


def losses(mesh: Mesh) -> list[float]:
    """The student's loss in each step."""
    groups.enter_mesh(mesh)
    config = engine_of(mesh={"context": mesh.context})
    teacher = make_engine(TEACHER, config, None, mesh, micro_batch=MICRO_BATCH)
    source = InitialWeights(TEACHER, 1)
    teacher.load_weights(source)
    kept = most_important(teacher.observe(batches(CALIBRATION, mesh, 0)), TEACHER, STUDENT)
    targets = teacher.keep_outputs(PAIRS.values())
    student = make_engine(STUDENT, config, OPTIM, mesh, micro_batch=MICRO_BATCH)
    student.match_outputs(
        Match(pairs=PAIRS, targets=targets, width=TEACHER.hidden_size, distance="cosine", weight=0.5, seed=1)
    )
    student.load_weights(PrunedWeights(source, TEACHER, STUDENT, kept))
    lesson = FromTeacher(teacher, Distillation(), 0)
    found = []
    for number in range(NUM_STEPS):
        given = batches(number, mesh, 0)
        found.append(student.step(given, lesson(given), learning_rate=LEARNING_RATE).loss)
    student.close()
    teacher.close()
    groups.leave_mesh()
    return found


@contextmanager
def doubles() -> Iterator[None]:
    """Let all of the Megatron engine compute in float64 what it does in float32."""
    config, norm = megatron.DistributedDataParallelConfig, torch.linalg.vector_norm
    prepare, projection = adam.prepare_step, hidden_states.initial_projection

    def prepare_step(of: Any, *, divisor: torch.Tensor, skip: torch.Tensor, learning_rate: float) -> None:
        # torch's kernel takes these two in float32 whatever the rest is.
        in_32_bits = (each.to(torch.float32) for each in (divisor, skip))
        prepare(of, divisor=next(in_32_bits), skip=next(in_32_bits), learning_rate=learning_rate)

    with ExitStack() as changes:
        for where, name, what in (
            (torch.Tensor, "float", torch.Tensor.double),
            (torch.linalg, "vector_norm", lambda *given, dtype=None, **options: norm(*given, **options)),
            (megatron, "DistributedDataParallelConfig", lambda **o: config(**(o | {"grad_reduce_in_fp32": False}))),
            (hidden_states, "initial_projection", lambda *given: projection(*given).double()),
            (adam, "prepare_step", prepare_step),
        ):
            changes.enter_context(mock.patch.object(where, name, what))
        changes.enter_context(mock.patch.dict(model.DTYPES, {"fp32": torch.float64}))
        torch.set_default_dtype(torch.float64)
        changes.callback(torch.set_default_dtype, torch.float32)
        yield


def _be_rank(rank: int, mesh: Mesh, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    groups.open_world(groups.join_store("localhost", port), rank=rank, world_size=mesh.world_size)
    narrow = losses(mesh)
    with doubles():
        wide = losses(mesh)
    if rank == 0:
        results.put((narrow, wide))
    groups.shut_down()


def on_ranks(mesh: Mesh) -> tuple[list[float], list[float]]:
    """Losses in float32 and in float64, computed in new processes."""
    context = multiprocessing.get_context("forkserver")
    store, results = groups.host_store(), context.Queue()
    ranks = [
        context.Process(target=_be_rank, args=(rank, mesh, store.port, results), daemon=True)
        for rank in range(mesh.world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        if process.exitcode:
            raise SystemExit("a rank failed")
    narrow, wide = results.get()
    return narrow, wide


def differences(some: Sequence[float], others: Sequence[float]) -> str:
    """Of each step, as cells of a table."""
    return " | ".join(f"{abs(mine - its):.1e}" for mine, its in zip(some, others, strict=True))


def main() -> None:
    """Run and print."""
    one, one_wide = on_ranks(Mesh())
    two, two_wide = on_ranks(Mesh(context=2))
    print("| loss differences | " + " | ".join(f"step {number}" for number in range(1, NUM_STEPS + 1)) + " |")
    print("| --- |" + " --- |" * NUM_STEPS)
    print(f"| context 2 and one rank, float32 | {differences(two, one)} |")
    print(f"| context 2 and one rank, float64 | {differences(two_wide, one_wide)} |")
    print(f"| one rank, float32 and float64 | {differences(one, one_wide)} |")
    print(f"| context 2, float32 and float64 | {differences(two, two_wide)} |")


if __name__ == "__main__":
    main()
