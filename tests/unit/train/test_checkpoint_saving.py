"""A save is whole or it is not there; training is told; what was good stays."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoint_samples import PROVENANCE, sample_tensors, save, save_alone, save_together

from conf.errors import CheckpointError
from parallel.engine import Piece
from train.checkpoint import Checkpoint, checkpoints_in, newest_verified
from train.saver import Saver, note_of_failure
from train.tensor_file import HostBuffer


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """The kernel refuses to let any file of this process grow beyond so many bytes, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files_below(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def steps_in(directory: Path) -> list[int]:
    return [Checkpoint.open(path).manifest.step for path in checkpoints_in(directory)]


def test_manifest_says_where_the_checkpoint_comes_from(tmp_path):
    manifest = save_alone(tmp_path, 120, sample_tensors()).manifest
    assert (manifest.step, manifest.samples, manifest.tokens) == (120, 480, 7680)
    assert manifest.provenance == PROVENANCE


def test_saved_values_are_those_at_the_call_whatever_training_does_next(tmp_path):
    tensors = sample_tensors()
    before = tensors["model.embed_tokens.weight"].clone()
    saver = Saver(tmp_path, rank=0, world_size=1, keep=2)
    save(saver, 1, tensors)
    tensors["model.embed_tokens.weight"].zero_()
    save(saver, 2, tensors)
    saver.wait()
    first, second = (
        Checkpoint.open(path).weights.read("model.embed_tokens.weight", (0, 0), (12, 8))
        for path in checkpoints_in(tmp_path)
    )
    assert torch.equal(first, before) and not second.any()


def test_views_are_saved_as_their_values(tmp_path):
    table = torch.arange(48).view(6, 8)
    checkpoint = save_alone(tmp_path, 1, {"t": table.T, "strided": table[::2, 1::3], "spread": table[0].expand(5, 8)})
    assert torch.equal(checkpoint.weights.read("t", (0, 0), (8, 6)), table.T)
    assert torch.equal(checkpoint.weights.read("strided", (0, 0), (3, 3)), table[::2, 1::3])
    assert torch.equal(checkpoint.weights.read("spread", (2, 0), (2, 8)), table[:1].expand(2, 8))


def test_full_disk_raises_once_leaves_nothing_and_spoils_nothing(tmp_path):
    tensors = sample_tensors() | {"large": torch.ones(1 << 16)}
    saver = Saver(tmp_path, rank=0, world_size=1, keep=1)
    save(saver, 1, sample_tensors())
    saver.wait()
    before = sorted(files_below(tmp_path))
    with largest_file(1 << 16):
        save(saver, 2, tensors)
        with pytest.raises(CheckpointError, match=r"cannot write .*weights/rank-00000\.safetensors: File too large"):
            saver.wait()
    assert sorted(files_below(tmp_path)) == before
    assert steps_in(tmp_path) == [1]
    Checkpoint.open(checkpoints_in(tmp_path)[0]).verify()
    save(saver, 3, tensors)
    saver.wait()
    assert steps_in(tmp_path) == [3]


def test_failure_is_raised_by_the_next_save_as_well(tmp_path):
    saver = Saver(tmp_path, rank=0, world_size=1, keep=1)
    with largest_file(64):
        save(saver, 1, sample_tensors())
        with pytest.raises(CheckpointError, match=r"File too large"):
            save(saver, 2, sample_tensors())
    assert files_below(tmp_path) == []


def test_one_rank_that_cannot_write_tells_all_of_them_why(tmp_path):
    directory = tmp_path / "checkpoints"
    savers = [Saver(directory, rank=rank, world_size=2, keep=1) for rank in range(2)]
    (directory / "step-00000001.partial-1" / "weights" / "rank-00001.safetensors").mkdir(parents=True)
    for saver in savers:
        save_part(saver, 1)
    for saver in savers:
        with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors: Is a directory"):
            saver.wait()
    assert checkpoints_in(directory) == []
    assert not list(directory.rglob("rank-00000.*"))
    for saver in savers:
        save_part(saver, 2)
    for saver in savers:
        saver.wait()
    assert [path.name for path in directory.iterdir()] == ["step-00000002"]


def save_part(saver: Saver, step: int) -> None:
    """Each of two ranks saves its row."""
    piece = Piece("w", (2, 3), (saver.rank, 0), torch.full((1, 3), float(saver.rank)))
    saver.save(step, weights=[piece], resume=[], provenance=PROVENANCE, samples=0, tokens=0)


def test_unwritable_place_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot make .*: Not a directory"):
        Saver(tmp_path / "file" / "checkpoints", rank=0, world_size=1, keep=1)


def test_rank_that_never_writes_is_noticed(tmp_path):
    saver = Saver(tmp_path, rank=0, world_size=2, keep=1, timeout_seconds=0.05)
    save_part(saver, 1)
    with pytest.raises(CheckpointError, match=r"waited .* for the other ranks' files .*weights: 1 of 2"):
        saver.wait()


@pytest.mark.parametrize("pieces", ["missing", "twice"])
def test_ranks_must_hold_every_element_once(tmp_path, pieces):
    first = Piece("w", (4,), (0,), torch.ones(2))
    second = Piece("w", (4,), (3,), torch.ones(1)) if pieces == "missing" else Piece("w", (4,), (1,), torch.ones(3))
    with pytest.raises(
        CheckpointError, match=rf"pieces of w hold {3 if pieces == 'missing' else 5} elements; it has 4"
    ):
        save_together(tmp_path, 1, [[first], [second]])
    assert checkpoints_in(tmp_path) == []


def test_ranks_must_agree_on_a_tensor(tmp_path):
    halves = [[Piece("w", (4,), (0,), torch.ones(2))], [Piece("w", (4,), (2,), torch.ones(2).half())]]
    with pytest.raises(CheckpointError, match=r"rank 1 holds w as F16 .* a lower rank as F32"):
        save_together(tmp_path, 1, halves)


def test_piece_outside_its_tensor_is_refused_at_the_call(tmp_path):
    saver = Saver(tmp_path, rank=0, world_size=1, keep=1)
    with pytest.raises(ValueError, match=r"w\[3:5\] .* is no box of a tensor of shape \(4,\)"):
        saver.save(
            1,
            weights=[Piece("w", (4,), (3,), torch.ones(2))],
            resume=[],
            provenance=PROVENANCE,
            samples=0,
            tokens=0,
        )


def test_only_the_newest_are_kept(tmp_path):
    saver = Saver(tmp_path, rank=0, world_size=1, keep=2)
    for step in range(1, 6):
        save(saver, step, sample_tensors())
    saver.wait()
    assert steps_in(tmp_path) == [4, 5]
    assert len(list(tmp_path.iterdir())) == 2


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path):
    saver = Saver(tmp_path, rank=0, world_size=1, keep=2)
    for step in (1, 2):
        save(saver, step, sample_tensors())
    saver.wait()
    (tmp_path / "step-00000002" / "weights" / "rank-00000.safetensors").unlink()
    save(saver, 3, sample_tensors())
    saver.wait()
    assert steps_in(tmp_path) == [1, 2, 3]


def test_checkpoint_of_the_same_step_is_replaced_and_later_ones_stay(tmp_path):
    for step in (1, 2, 3):
        save_alone(tmp_path, step, sample_tensors())
    checkpoint = save_alone(tmp_path, 2, sample_tensors(seed=7), keep=1)
    assert checkpoint.weights.read("step", (), ()) == 48
    assert steps_in(tmp_path) == [2, 3]


def test_a_rank_that_looks_for_failures_while_the_directory_gets_its_name_sees_none(tmp_path):
    partial, target, over = tmp_path / "step-1.partial-1", tmp_path / "step-1", threading.Event()
    partial.mkdir()

    def rename_back_and_forth():
        while not over.is_set():
            partial.rename(target)
            target.rename(partial)

    renaming = threading.Thread(target=rename_back_and_forth)
    renaming.start()
    try:
        assert {note_of_failure(partial) for _ in range(3000)} == {None}
    finally:
        over.set()
        renaming.join()
    (partial / "rank-00003.failed").write_text("no space")
    assert note_of_failure(partial) == "no space"


def test_leftovers_of_an_interrupted_run_are_cleared(tmp_path):
    good = save_alone(tmp_path, 1, sample_tensors())
    partial = tmp_path / "step-00000002.partial-1" / "weights"
    partial.mkdir(parents=True)
    (partial / "rank-00000.safetensors").write_bytes(b"half")
    (tmp_path / "step-00000003" / "weights").mkdir(parents=True)
    assert newest_verified(tmp_path).checkpoint.path == good.path
    Saver(tmp_path, rank=0, world_size=1, keep=1)
    assert list(tmp_path.iterdir()) == [good.path]


def test_save_interrupted_after_its_manifest_is_finished_by_the_next_run(tmp_path):
    complete = save_alone(tmp_path, 5, sample_tensors()).path
    complete.rename(tmp_path / "step-00000005.partial-3")
    Saver(tmp_path, rank=0, world_size=1, keep=1)
    assert steps_in(tmp_path) == [5]


def test_memory_is_used_again_by_the_next_save_of_the_same_size():
    buffer = HostBuffer()
    addresses = {buffer.take(num_bytes, pinned=False).data_ptr() for num_bytes in (100_000, 7, 100_000)}
    assert len(addresses) == 1 and addresses.pop() % 4096 == 0
    assert buffer.take(200_000, pinned=False).numel() == 49 * 4096


def test_file_system_without_direct_writing_is_written_to_all_the_same(tmp_path, monkeypatch):
    refused = []

    def open_buffered_only(path, flags, *rest):
        if flags & os.O_DIRECT:
            refused.append(path)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *rest)

    real_open = os.open
    monkeypatch.setattr("train.tensor_file.os.open", open_buffered_only)
    save_alone(tmp_path, 1, sample_tensors()).verify()
    assert len(refused) == 2
