"""A checkpoint: a directory that holds a model, and what its training needs to go on, in pieces any layout can read.

    step-00000120/
        manifest.json                   written last: without it, this is no checkpoint
        weights/rank-00000.safetensors  the model under its canonical names: all that crosses stages and engines
        weights/rank-00000.json         table of the pieces in that file, each with its hash
        weights/rank-00001.safetensors  ...
        resume/rank-00000.safetensors   optimizer state, likewise
        resume/rank-00000.json

A *piece* is a box of a logical tensor, as a rank held it. Nothing is gathered to be saved, and a reader asks for the
boxes *it* needs, which are put together from whatever pieces overlap them:

    up_proj.weight, saved by 2 tensor ranks        read by tensor rank 1 of 3
        +----------------+  rank-00000,                +----------------+
        |                |  key up_proj.weight@0,0     |                |
        |                |                             +----------------+
        +----------------+  rank-00001,                |  rows 2:4      |  <- rows 2:3 of rank-00000
        |                |  key up_proj.weight@3,0     +----------------+  <- rows 3:4 of rank-00001
        |                |                             |                |
        +----------------+                             +----------------+

Every byte is under a hash, and hashes are checked on reading: the manifest holds the digest of its own contents and of
each table, a table those of its file's header and pieces. So the manifest's digest names the values of the whole
checkpoint, and lineage (`Parent`) refers to it. The manifest also says which files hold pieces of which tensor; the
reader opens only those tables. There is no pickle: safetensors and JSON only.

    python -m train.checkpoint list|show|verify PATH
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from conf.errors import CheckpointError
from conf.schema import ModelConfig
from train.box import Box
from train.manifest import MANIFEST, Half, Manifest, Parent, Provenance, decode_manifest, decode_table, table_path
from train.tensor_file import DTYPES, TensorFile

# What a model is called, starts from and was trained up to does not change what its weights mean.
_FIELDS_WITHOUT_MEANING = frozenset({"name", "init_std", "max_sequence_length"})
_STEP_DIRECTORY = re.compile(r"step-([0-9]{8,})")


class StoredTensors:
    """The tensors of one half of a checkpoint; a TensorSource. Nothing is read before it is asked for."""

    def __init__(self, root: Path, half: Half) -> None:
        self._root = root
        self._half = half
        self._files: dict[int, TensorFile] = {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every logical tensor by name."""
        return {name: tensor.shape for name, tensor in self._half.tensors.items()}

    def read(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The box of the named tensor that starts at `offset`, on the CPU, in the dtype it was saved in.

        Raises:
            CheckpointError: there is no such tensor, the box is outside it, or its bytes are damaged.
        """
        tensor = self._half.tensors.get(name)
        if tensor is None:
            near = difflib.get_close_matches(name, self._half.tensors, n=1)
            hint = f"; the nearest name is {near[0]}" if near else ""
            raise CheckpointError(f"{self._root} holds no tensor {name}{hint}. Is it a checkpoint of another model?")
        box = Box(offset, shape)
        if not box.is_inside(tensor.shape):
            raise CheckpointError(f"{name}{box} is outside the tensor in {self._root}, which has shape {tensor.shape}.")
        values = torch.empty(shape, dtype=DTYPES[tensor.dtype])
        missing = [box] if box.num_elements else []
        for index in tensor.files:
            if not missing:
                break
            file = self.file(index)
            for piece in file.pieces_of(name):
                if Box(piece.offset, piece.shape) == box:
                    return file.read(piece, box)
            missing = self._fill(values, name, box, missing, file)
        if missing:
            raise CheckpointError(f"{self._root}: no file holds {name}{missing[0]}; the checkpoint is incomplete.")
        return values

    @property
    def num_files(self) -> int:
        """How many tensor files there are."""
        return len(self._half.files)

    def file(self, index: int) -> TensorFile:
        """A tensor file by its number in the manifest.

        Raises:
            CheckpointError: its table is missing or damaged.
        """
        if index not in self._files:
            stored = self._half.files[index]
            path = table_path(self._root, stored.file)
            try:
                text = path.read_bytes()
            except OSError as error:
                raise CheckpointError(f"cannot read {path}: {error.strerror}. Use an older checkpoint.") from error
            if hashlib.sha256(text).hexdigest() != stored.table_sha256:
                raise CheckpointError(f"{path} is damaged (its bytes are not those saved). Use an older checkpoint.")
            self._files[index] = TensorFile(self._root / stored.file, decode_table(text, path))
        return self._files[index]

    @staticmethod
    def _fill(values: Tensor, name: str, box: Box, missing: list[Box], file: TensorFile) -> list[Box]:
        for piece in file.pieces_of(name):
            held = Box(piece.offset, piece.shape)
            for wanted in missing:
                part = wanted.overlap(held)
                if part is not None:
                    values[part.slices_in(box)] = file.read(piece, part)
            missing = [rest for wanted in missing for rest in wanted.minus(held)]
        return missing


class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        path: its directory.
        manifest: what it says about itself.
        manifest_sha256: digest of the manifest, which covers every byte of the checkpoint.
        weights: the model under canonical names.
        resume: optimizer state.
    """

    def __init__(self, path: Path, manifest: Manifest, manifest_sha256: str) -> None:
        self.path = path
        self.manifest = manifest
        self.manifest_sha256 = manifest_sha256
        self.weights = StoredTensors(path, manifest.weights)
        self.resume = StoredTensors(path, manifest.resume)

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read the manifest; tensors are read, and their hashes checked, when asked for.

        Raises:
            CheckpointError: there is no manifest, or it is damaged or of another version.
        """
        file = path / MANIFEST
        try:
            text = file.read_bytes()
        except FileNotFoundError as error:
            why = (
                "there is no such directory" if not path.is_dir() else f"it has no {MANIFEST} (was its save cut short?)"
            )
            raise CheckpointError(f"{path} is not a checkpoint: {why}.") from error
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
        return cls(path, *decode_manifest(text, file))

    @property
    def num_bytes(self) -> int:
        """Size of all tensor files."""
        return self.manifest.num_bytes

    def require_model(self, model: ModelConfig) -> None:
        """Refuse to be read into another model.

        Raises:
            CheckpointError: lists the fields that differ.
        """
        saved, wanted = asdict(self.manifest.provenance.model), asdict(model)
        differing = [
            f"{field} is {saved[field]} in the checkpoint and {wanted[field]} here"
            for field in wanted
            if field not in _FIELDS_WITHOUT_MEANING and saved[field] != wanted[field]
        ]
        if differing:
            raise CheckpointError(
                f"{self.path} holds another model: {'; '.join(differing)}. Set model.* to the checkpoint's values "
                f"(`python -m train.checkpoint show {self.path}`), or name another checkpoint."
            )

    def check_files(self) -> None:
        """Check that every table is as it was saved and every tensor file has its size; no tensor data is read.

        Raises:
            CheckpointError: a file is missing, truncated, or its table is damaged.
        """
        for half in (self.weights, self.resume):
            for index in range(half.num_files):
                half.file(index).check_size()

    def verify(
        self, share: int = 0, shares: int = 1, *, on_file: Callable[[int], None] = lambda num_bytes: None
    ) -> None:
        """Compare every byte with its hash.

        Args:
            share: which part of the files to look at, for ranks that divide the work.
            shares: how many parts there are.
            on_file: called with the size of each file that was looked at.

        Raises:
            CheckpointError: lists everything that is damaged.
        """
        files = [(half, index) for half in (self.weights, self.resume) for index in range(half.num_files)]
        faults: list[str] = []
        # Hashing releases the interpreter: threads take it to the speed of the disk.
        with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // shares)) as threads:
            for num_bytes, found in threads.map(lambda file: _faults(*file), files[share::shares]):
                faults += found
                on_file(num_bytes)
        if faults:
            raise CheckpointError(f"{self.path} is damaged:\n" + "\n".join(f"  - {fault}" for fault in faults))


@dataclass(frozen=True, slots=True)
class Newest:
    """The newest checkpoint whose every byte is as it was saved.

    Attributes:
        checkpoint: None where no checkpoint is intact.
        passed_over: why each newer one was not taken, newest first.
    """

    checkpoint: Checkpoint | None
    passed_over: tuple[str, ...]


def newest_verified(directory: Path) -> Newest:
    """Go back from the newest checkpoint in a directory to the first without damage."""
    passed_over: list[str] = []
    for path in reversed(checkpoints_in(directory)):
        try:
            checkpoint = Checkpoint.open(path)
            checkpoint.verify()
            return Newest(checkpoint, tuple(passed_over))
        except CheckpointError as error:
            passed_over.append(str(error))
    return Newest(None, tuple(passed_over))


def checkpoint_name(step: int) -> str:
    """Name of the directory of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step a directory is the checkpoint of, by its name; None where it is none."""
    match = _STEP_DIRECTORY.fullmatch(path.name)
    return int(match[1]) if match else None


def checkpoints_in(directory: Path) -> list[Path]:
    """Every directory here that has a manifest, oldest step first; whether they are intact is not looked at."""
    found = [path for path in directory.glob("step-*") if step_of(path) is not None and (path / MANIFEST).exists()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _faults(half: StoredTensors, index: int) -> tuple[int, list[str]]:
    try:
        file = half.file(index)
    except CheckpointError as error:
        return 0, [str(error)]
    return file.table.num_bytes, file.faults()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    from train.checkpoint_cli import run

    return run(arguments)


__all__ = ["Checkpoint", "Newest", "Parent", "Provenance", "StoredTensors", "checkpoints_in", "newest_verified"]

if __name__ == "__main__":
    sys.exit(main())
