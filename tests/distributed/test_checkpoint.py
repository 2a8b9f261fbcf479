"""Processes that share nothing but a directory save one checkpoint, and a reader that is cut otherwise reads it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch

from conf.errors import CheckpointError
from conf.schema import EngineConfig, MeshConfig, ModelConfig
from parallel.engine import Piece
from train.checkpoint import Checkpoint, Provenance, checkpoints_in, newest_verified
from train.saver import Saver

NUM_RANKS = 3
ROWS, COLUMNS = 31, 17
LIMIT_SECONDS = 120

PROVENANCE = Provenance(
    run="run",
    recipe="recipe",
    stage="pretrain",
    model=ModelConfig(
        name="tiny",
        num_layers=1,
        hidden_size=COLUMNS,
        ffn_hidden_size=ROWS,
        num_attention_heads=1,
        num_kv_heads=1,
        head_dim=COLUMNS,
        vocab_size=ROWS,
        max_sequence_length=8,
        rope_theta=1e4,
        norm_epsilon=1e-5,
        init_std=0.02,
        tied_embeddings=True,
    ),
    engine=EngineConfig(
        backend="megatron",
        mesh=MeshConfig(tensor=NUM_RANKS, context=1, pipeline=1, virtual_pipeline=1, data=1),
        precision="fp32",
        sequence_parallel=False,
        zero_stage=1,
        offload_optimizer="none",
        overlap=False,
        recompute="none",
    ),
    tokenizer="0" * 64,
    data={},
    parents=(),
)


def logical_tensor(step: int) -> torch.Tensor:
    return torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS) + 1000 * step


def save_on_rank(rank: int, directory: Path, made: Barrier, results: multiprocessing.Queue) -> None:
    """Deal rows out as weights and columns as optimizer state; rank 1 cannot write step 3 and dies before step 5."""
    saver = Saver(directory, rank=rank, world_size=NUM_RANKS, keep=2, timeout_seconds=3)
    made.wait(LIMIT_SECONDS)
    outcome: dict[int, str] = {}
    for step in range(1, 6):
        whole = logical_tensor(step)
        rows, columns = whole.tensor_split(NUM_RANKS, 0), whole.tensor_split(NUM_RANKS, 1)
        above = sum(part.shape[0] for part in rows[:rank])
        left = sum(part.shape[1] for part in columns[:rank])
        if (step, rank) == (3, 1):
            (directory / "step-00000003.partial-3" / "resume" / "rank-00001.safetensors").mkdir(parents=True)
        if (step, rank) == (5, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        saver.save(
            step,
            weights=[Piece("w", (ROWS, COLUMNS), (above, 0), rows[rank])],
            resume=[Piece("exp_avg/w", (ROWS, COLUMNS), (0, left), columns[rank])],
            provenance=PROVENANCE,
            samples=step,
            tokens=step,
        )
        try:
            saver.wait()
            # Complete means complete on every rank, as soon as any rank is told so.
            Checkpoint.open(directory / f"step-{step:08d}").check_files()
            outcome[step] = "saved"
        except CheckpointError as error:
            outcome[step] = str(error)
    results.put((rank, outcome))


def test_ranks_agree_through_the_file_system_alone(tmp_path):
    directory = tmp_path / "checkpoints"
    context = multiprocessing.get_context("spawn")
    results, made = context.Queue(), context.Barrier(NUM_RANKS)
    ranks = [
        context.Process(target=save_on_rank, args=(rank, directory, made, results), daemon=True)
        for rank in range(NUM_RANKS)
    ]
    for rank in ranks:
        rank.start()
    outcomes = dict(results.get(timeout=LIMIT_SECONDS) for _ in range(NUM_RANKS - 1))
    for rank in ranks:
        rank.join(LIMIT_SECONDS)
    assert [rank.exitcode for rank in ranks] == [0, -signal.SIGKILL, 0]

    for rank in (0, 2):
        assert [step for step, text in outcomes[rank].items() if text == "saved"] == [1, 2, 4]
        assert "rank-00001.safetensors: Is a directory" in outcomes[rank][3]
        assert "for the other ranks' files" in outcomes[rank][5]
    assert [path.name for path in checkpoints_in(directory)] == ["step-00000002", "step-00000004"]

    newest = newest_verified(directory)
    assert newest.checkpoint is not None and newest.passed_over == ()
    whole = logical_tensor(4)
    for num_readers in (1, 2, 4, 5):
        for above, part in zip(starts(ROWS, num_readers), whole.tensor_split(num_readers, 0), strict=True):
            assert torch.equal(newest.checkpoint.resume.read("exp_avg/w", (above, 0), tuple(part.shape)), part)
        for left, part in zip(starts(COLUMNS, num_readers), whole.tensor_split(num_readers, 1), strict=True):
            assert torch.equal(newest.checkpoint.weights.read("w", (0, left), tuple(part.shape)), part)


def starts(size: int, parts: int) -> list[int]:
    sizes = [len(part) for part in torch.arange(size).tensor_split(parts)]
    return [sum(sizes[:part]) for part in range(parts)]
