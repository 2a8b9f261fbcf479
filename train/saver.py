"""Saving without making training wait: the loop pays for a copy to host memory, a thread does the rest.

Ranks agree through the file system, because a collective in a thread would race those of training:

    every rank   writes its files into step-N.partial-A/, then their tables, which appear by rename: "these are durable"
    rank 0       sees all tables, writes manifest.json, renames the directory to step-N/, checks it, deletes old ones
    others       see step-N/ appear

A rank that cannot write deletes what it wrote and leaves a note, so that all ranks raise the same reason. Notes and
partial directories are deleted by the next save that succeeds, or when rank 0 makes its next Saver.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import get_args

import torch

from conf.errors import CheckpointError
from parallel.engine import Piece
from train.checkpoint import Checkpoint, checkpoint_name, checkpoints_in, step_of
from train.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    Half,
    HalfName,
    Manifest,
    PieceTable,
    Provenance,
    StoredFile,
    StoredTensor,
    decode_table,
    encode_manifest,
    encode_table,
    file_name,
    sync_directory,
    table_path,
    write_durably,
)
from train.tensor_file import HostBuffer, StagedFile, stage_file, write_file

_HALVES: tuple[HalfName, ...] = get_args(HalfName)
_SHORTEST_POLL_SECONDS = 0.005
_LONGEST_POLL_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Save:
    """One save on its way to the disk."""

    partial: Path
    target: Path
    step: int
    samples: int
    tokens: int
    provenance: Provenance
    staged: tuple[StagedFile, ...]


class Saver:
    """Writes one rank's part of each checkpoint of a directory, which all ranks share.

    Make it on every rank, and let a collective come between that and the first save: rank 0 tidies up what an
    interrupted run left behind.

    Args:
        directory: of the checkpoints; made if need be.
        rank: this one.
        world_size: ranks that save together.
        keep: newest checkpoints kept; older ones are deleted once a newer one is durable and checked.
        timeout_seconds: how long one rank's files may take longer than another's.

    Raises:
        CheckpointError: the directory cannot be written to.
    """

    def __init__(
        self, directory: Path, *, rank: int, world_size: int, keep: int, timeout_seconds: float = 1800.0
    ) -> None:
        assert keep >= 1
        self._directory = directory
        self.rank = rank
        self._world_size = world_size
        self._keep = keep
        self._timeout_seconds = timeout_seconds
        self._buffers = {half: HostBuffer() for half in _HALVES}
        self._num_saves = 0
        self._thread: threading.Thread | None = None
        self._pending: Future[Path] | None = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make {directory}: {error.strerror}") from error
        if not os.access(directory, os.W_OK | os.X_OK):
            raise CheckpointError(f"cannot write to {directory}: permission denied")
        if rank == 0:
            _recover(directory)

    def save(
        self,
        step: int,
        *,
        weights: Iterable[Piece],
        resume: Iterable[Piece],
        provenance: Provenance,
        samples: int,
        tokens: int,
    ) -> Future[Path]:
        """Copy this rank's pieces to host memory and write them in the background. Every rank calls it alike.

        Waits for the save before. At most one copy of this rank's pieces is held, in memory that the next save reuses.

        Args:
            step: optimizer steps completed; a checkpoint of that step that is there already is replaced.
            weights: over all ranks, every element of every tensor once.
            resume: likewise.
            provenance: where it comes from.
            samples: consumed by the stage.
            tokens: trained on in the stage.

        Returns:
            The checkpoint's directory, once it is complete. Its callbacks run in the background thread.

        Raises:
            CheckpointError: the save before failed; nothing of this one was done.
        """
        self.wait()
        self._num_saves += 1
        target = self._directory / checkpoint_name(step)
        save = _Save(
            partial=target.with_name(f"{target.name}.partial-{self._num_saves}"),
            target=target,
            step=step,
            samples=samples,
            tokens=tokens,
            provenance=provenance,
            staged=tuple(
                stage_file(file_name(half, self.rank), list(pieces), self._buffers[half])
                for half, pieces in zip(_HALVES, (weights, resume), strict=True)
            ),
        )
        self._pending = Future()
        # A daemon: a rank that fails for another reason exits at once instead of waiting for its peers' files.
        self._thread = threading.Thread(target=self._run, args=(save, self._pending), daemon=True, name=target.name)
        self._thread.start()
        return self._pending

    def wait(self) -> None:
        """Return when the last save is complete on all ranks and its callbacks have run.

        Raises:
            CheckpointError: it failed. Said once; earlier checkpoints are as they were, and saving may go on.
        """
        if self._thread is None or self._pending is None:
            return
        self._thread.join()
        pending, self._thread, self._pending = self._pending, None, None
        pending.result()

    def _run(self, save: _Save, pending: Future[Path]) -> None:
        try:
            self._write(save)
            if self.rank == 0:
                self._publish(save)
            else:
                self._await(save, lambda: (save.target / MANIFEST).exists() and not save.partial.exists())
        except Exception as error:
            reason = error
            if isinstance(error, OSError):
                reason = CheckpointError(f"cannot save {save.target}: {error.strerror} ({error.filename})")
            self._give_up(save, str(reason))
            pending.set_exception(reason)
        else:
            pending.set_result(save.target)

    def _write(self, save: _Save) -> None:
        for half in _HALVES:
            (save.partial / half).mkdir(parents=True, exist_ok=True)
        # Side by side, because one is synced while the other is still being written.
        with ThreadPoolExecutor(len(_HALVES)) as threads:
            for done in [threads.submit(_write_half, save.partial, staged) for staged in save.staged]:
                done.result()

    def _publish(self, save: _Save) -> None:
        self._await(save, lambda: all(_num_tables(save.partial / half) == self._world_size for half in _HALVES))
        weights, resume = (_collected(save.partial, half, self._world_size) for half in _HALVES)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            step=save.step,
            samples=save.samples,
            tokens=save.tokens,
            saved_at=time.time(),
            provenance=save.provenance,
            weights=weights,
            resume=resume,
        )
        for half in _HALVES:
            sync_directory(save.partial / half)
        write_durably(save.partial / MANIFEST, encode_manifest(manifest))
        sync_directory(save.partial)
        # Listed before the others can see this save end, and so before the next one's directory can be there.
        leftovers = [path for path in _leftovers(self._directory) if path != save.partial]
        if save.target.exists():
            leftovers.append(save.target.rename(save.partial.with_name(f"{save.partial.name}-replaced")))
        save.partial.rename(save.target)
        sync_directory(self._directory)
        Checkpoint.open(save.target).check_files()
        _delete_old(self._directory, save.step, self._keep)
        for path in leftovers:
            shutil.rmtree(path, ignore_errors=True)

    def _await(self, save: _Save, is_done: Callable[[], bool]) -> None:
        started = time.monotonic()
        while not is_done():
            waited = time.monotonic() - started
            if note := note_of_failure(save.partial):
                raise CheckpointError(note)
            if waited > self._timeout_seconds:
                raise CheckpointError(
                    f"waited {self._timeout_seconds:.0f} s for the other ranks' files in {save.partial} "
                    f"({', '.join(_progress(save.partial, self._world_size))}). "
                    "Do all nodes share this directory?"
                )
            # Looks often at first and seldom later: 5 % late at most, and thousands of ranks do not flood a server.
            time.sleep(min(max(_SHORTEST_POLL_SECONDS, waited / 20), _LONGEST_POLL_SECONDS))

    def _give_up(self, save: _Save, reason: str) -> None:
        """Delete what this rank wrote, and tell the others."""
        if self._world_size == 1:
            shutil.rmtree(save.partial, ignore_errors=True)
            return
        files = [save.partial / file_name(half, self.rank) for half in _HALVES]
        for path in (*files, *(file.with_suffix(".json") for file in files)):
            with suppress(OSError):
                path.unlink()
        # Where not even the note can be written, the others find out by waiting.
        with suppress(OSError):
            if not any(save.partial.glob("rank-*.failed")):
                note = save.partial / f"rank-{self.rank:05d}.failed"
                write_durably(note, f"rank {self.rank}: {reason}".encode())


def _write_half(root: Path, staged: StagedFile) -> None:
    table = write_file(root, staged)
    write_durably(table_path(root, table.file), encode_table(table))


def _collected(root: Path, half: HalfName, world_size: int) -> Half:
    """What all ranks' tables say together.

    Raises:
        CheckpointError: ranks disagree about a tensor, or do not hold each of its elements once.
    """
    files: list[StoredFile] = []
    tensors: dict[str, StoredTensor] = {}
    num_elements: dict[str, int] = {}
    for rank in range(world_size):
        path = table_path(root, file_name(half, rank))
        text = path.read_bytes()
        table = decode_table(text, path)
        _add_table(table, rank, tensors, num_elements)
        digest = hashlib.sha256(text).hexdigest()
        files.append(StoredFile(file=table.file, num_bytes=table.num_bytes, table_sha256=digest))
    for name, tensor in tensors.items():
        whole = torch.Size(tensor.shape).numel()
        if num_elements[name] != whole:
            raise CheckpointError(f"the ranks' pieces of {name} hold {num_elements[name]} elements; it has {whole}.")
    return Half(files=tuple(files), tensors=tensors)


def _add_table(table: PieceTable, rank: int, tensors: dict[str, StoredTensor], num_elements: dict[str, int]) -> None:
    for piece in table.pieces:
        known = tensors.get(piece.name, StoredTensor(dtype=piece.dtype, shape=piece.global_shape, files=()))
        if (known.dtype, known.shape) != (piece.dtype, piece.global_shape):
            raise CheckpointError(
                f"rank {rank} holds {piece.name} as {piece.dtype} of shape {piece.global_shape}, "
                f"and a lower rank as {known.dtype} of shape {known.shape}."
            )
        if known.files[-1:] != (rank,):
            known = StoredTensor(dtype=known.dtype, shape=known.shape, files=(*known.files, rank))
        tensors[piece.name] = known
        num_elements[piece.name] = num_elements.get(piece.name, 0) + torch.Size(piece.shape).numel()


def _delete_old(directory: Path, step: int, keep: int) -> None:
    """Delete what is older than the newest `keep` sound checkpoints up to `step`, which is sound itself."""
    num_sound = 0
    for path in reversed(checkpoints_in(directory)):
        if num_sound == keep:
            # Without its manifest it is no checkpoint, however far the deletion gets.
            (path / MANIFEST).unlink()
            shutil.rmtree(path, ignore_errors=True)
        elif (step_of(path) or 0) <= step:
            num_sound += _is_sound(path)


def _is_sound(path: Path) -> bool:
    try:
        Checkpoint.open(path).check_files()
    except CheckpointError:
        return False
    return True


def note_of_failure(partial: Path) -> str | None:
    """What a rank that has given up left for the others, if one has.

    One look at the directory: between two, the first rank may give it its final name.
    """
    try:
        notes = sorted(name for name in os.listdir(partial) if fnmatch(name, "rank-*.failed"))
        return (partial / notes[0]).read_text() if notes else None
    except FileNotFoundError:
        return None


def _leftovers(directory: Path) -> list[Path]:
    complete = set(checkpoints_in(directory))
    return [path for path in directory.glob("step-*") if path not in complete]


def _recover(directory: Path) -> None:
    """Finish a save that was interrupted between its manifest and its rename; delete other leftovers."""
    for path in sorted(_leftovers(directory)):
        target = path.with_name(path.name.partition(".")[0])
        if (path / MANIFEST).exists() and not target.exists():
            path.rename(target)
    for path in _leftovers(directory):
        shutil.rmtree(path, ignore_errors=True)


def _num_tables(directory: Path) -> int:
    return sum(entry.name.endswith(".json") for entry in os.scandir(directory))


def _progress(partial: Path, world_size: int) -> list[str]:
    return [f"{half}: {_num_tables(partial / half)} of {world_size}" for half in _HALVES if (partial / half).is_dir()]
