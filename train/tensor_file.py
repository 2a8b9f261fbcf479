"""One rank's tensor file: a standard safetensors file, written with a hash for every piece and checked when read.

    8 bytes: header length | JSON header, padded | pieces, largest element size first, without gaps

The order keeps every piece aligned to its element size; safetensors allows no padding between tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from conf.errors import CheckpointError
from parallel.engine import Piece
from train.box import Box
from train.manifest import PieceTable, StoredPiece

DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}

_ALIGNMENT = 64
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedPiece:
    """Where a copied piece is in the data of its file, in bytes."""

    name: str
    dtype: torch.dtype
    global_shape: tuple[int, ...]
    box: Box
    begin: int
    num_bytes: int

    @property
    def key(self) -> str:
        """Of the piece in the safetensors file."""
        return f"{self.name}@{','.join(map(str, self.box.offset))}"


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedFile:
    """A tensor file in host memory: nothing in it changes when training goes on."""

    file: str
    header: bytes
    data: Tensor
    pieces: tuple[StagedPiece, ...]


def stage_file(file: str, pieces: Sequence[Piece], allocate: Callable[[int, bool], Tensor]) -> StagedFile:
    """Copy pieces from where they live into host memory, laid out as they will be on disk.

    Args:
        file: name of the file inside the checkpoint.
        pieces: what this rank holds; boxes without elements are dropped unless their tensor has none.
        allocate: host memory of so many bytes (uint8), pinned where the flag says so.

    Raises:
        ValueError: a piece is outside its tensor, twice there, or of a dtype that safetensors does not know.
    """
    kept = [piece for piece in pieces if piece.tensor.numel() or not math.prod(piece.global_shape)]
    kept.sort(key=lambda piece: -piece.tensor.element_size())
    on_gpu = any(piece.tensor.is_cuda for piece in kept)
    staged = _laid_out(kept)
    data = allocate(sum(piece.num_bytes for piece in staged), on_gpu)
    for piece, place in zip(kept, staged, strict=True):
        target = data[place.begin : place.begin + place.num_bytes].view(place.dtype).view(place.box.shape)
        target.copy_(piece.tensor.detach(), non_blocking=on_gpu)
    if on_gpu:
        torch.cuda.synchronize()
    return StagedFile(file=file, header=_header(staged), data=data, pieces=tuple(staged))


def write_file(root: Path, staged: StagedFile) -> PieceTable:
    """Write a tensor file and make it durable; hashing goes on beside writing.

    Raises:
        CheckpointError: it cannot be written; names file and reason. What was written of it is left to the caller.
    """
    contents = memoryview(staged.data.numpy())
    with ThreadPoolExecutor(1) as hasher:
        digests = hasher.map(
            lambda piece: _sha256(contents[piece.begin : piece.begin + piece.num_bytes]), staged.pieces
        )
        path = root / staged.file
        try:
            with path.open("wb", buffering=0) as file:
                _write_all(file.fileno(), memoryview(staged.header))
                _write_all(file.fileno(), contents)
                os.fsync(file.fileno())
        except OSError as error:
            hasher.shutdown(cancel_futures=True)
            raise CheckpointError(f"cannot write {path}: {error.strerror}") from error
        return _table(staged, list(digests))


class TensorFile:
    """A tensor file to read boxes from. The bytes of a piece are compared with its hash once a process."""

    def __init__(self, path: Path, table: PieceTable) -> None:
        self.path = path
        self.table = table
        self._is_header_verified = False
        self._verified: set[StoredPiece] = set()

    def read(self, piece: StoredPiece, box: Box) -> Tensor:
        """The part of a piece that `box` (inside it, not empty) asks for, shaped like the box.

        Raises:
            CheckpointError: the file is missing, truncated, or its bytes are not those that were saved.
        """
        dtype = _dtype(piece, self.path)
        held = Box(piece.offset, piece.shape)
        try:
            descriptor = self._open()
            try:
                if not self._is_header_verified:
                    self._verify_header(descriptor)
                if piece not in self._verified:
                    data = _read(descriptor, piece.begin, piece.num_bytes)
                    self._verify(piece, _sha256(memoryview(data.numpy())))
                    return data.view(dtype).view(piece.shape)[box.slices_in(held)]
                rows = _rows(held, box)
                row_bytes = piece.num_bytes // max(1, math.prod(held.shape[:1]))
                begin = piece.begin + (rows.offset[0] - held.offset[0]) * row_bytes if rows.offset else piece.begin
                data = _read(descriptor, begin, rows.num_elements * dtype.itemsize)
                return data.view(dtype).view(rows.shape)[box.slices_in(rows)]
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}. Use an older checkpoint.") from error

    def check_size(self) -> None:
        """Compare what the directory says with what was saved; no contents are read.

        Raises:
            CheckpointError: the file is missing or has another size.
        """
        try:
            os.close(self._open())
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}. Use an older checkpoint.") from error

    def faults(self) -> list[str]:
        """Compare every byte with its hash, in little memory; what is damaged, or nothing."""
        found: list[str] = []
        try:
            descriptor = self._open()
            try:
                for verify in (
                    lambda: self._verify_header(descriptor),
                    *(lambda piece=piece: self._verify_stored(descriptor, piece) for piece in self.table.pieces),
                ):
                    try:
                        verify()
                    except CheckpointError as error:
                        found.append(str(error))
            finally:
                os.close(descriptor)
        except OSError as error:
            found.append(f"cannot read {self.path}: {error.strerror}")
        except CheckpointError as error:
            found.append(str(error))
        return found
