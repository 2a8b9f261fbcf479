"""One rank's tensor file: a standard safetensors file, written with a hash for every piece and checked when read.

    8 bytes: header length | JSON header, padded | pieces, largest element size first, without gaps

The order keeps every piece aligned to its element size; safetensors allows no padding between tensors.

The hash is XXH3 of 128 bits: damage is found as surely as by SHA-256 at a fifth of the processor time, which is what
saving and loading would otherwise be bound by (bench/checkpoint.py).
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from xxhash import xxh3_128

from conf.errors import CheckpointError
from parallel.engine import Piece
from train.box import Box
from train.manifest import DtypeCode, PieceTable, StoredPiece

DTYPE_CODES: dict[torch.dtype, DtypeCode] = {
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
_PAGE_BYTES = 4096
_WRITE_BYTES = 8 << 20
# What fits the processor's cache is fetched from memory once, to be copied and to be hashed.
_READ_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedPiece:
    """Where a copied piece is in the data of its file (after the header), in bytes."""

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
    """A tensor file in host memory: nothing in it changes when training goes on.

    Attributes:
        file: its name inside the checkpoint.
        image: uint8, aligned to a page and padded to whole pages: the file as it will be on disk.
        header_bytes: of the image; the pieces follow.
        num_bytes: of the image without its padding.
        pieces: what is in it.
    """

    file: str
    image: Tensor
    header_bytes: int
    num_bytes: int
    pieces: tuple[StagedPiece, ...]


class HostBuffer:
    """Memory for one staged file after another, allocated when a larger one comes."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int, *, pinned: bool) -> Tensor:
        """So many bytes and the rest of the last page, starting at a page; what was taken before is overwritten."""
        padded = -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES
        if self._memory.numel() < padded + _PAGE_BYTES:
            self._memory = torch.empty(padded + _PAGE_BYTES, dtype=torch.uint8, pin_memory=pinned)
        start = -self._memory.data_ptr() % _PAGE_BYTES
        return self._memory[start : start + padded]


def stage_file(file: str, pieces: Sequence[Piece], buffer: HostBuffer) -> StagedFile:
    """Copy pieces from where they live into host memory, laid out as they will be on disk.

    Args:
        file: name of the file inside the checkpoint.
        pieces: what this rank holds; boxes without elements are dropped unless their tensor has none.
        buffer: where they are copied to.

    Raises:
        ValueError: a piece is outside its tensor, twice there, or of a dtype that safetensors does not know.
    """
    kept = [piece for piece in pieces if piece.tensor.numel() or not math.prod(piece.global_shape)]
    kept.sort(key=lambda piece: -piece.tensor.element_size())
    staged = _laid_out(kept)
    header = _header(staged)
    num_bytes = len(header) + sum(piece.num_bytes for piece in staged)
    on_gpu = any(piece.tensor.is_cuda for piece in kept)
    image = buffer.take(num_bytes, pinned=on_gpu)
    image[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    for piece, place in zip(kept, staged, strict=True):
        begin = len(header) + place.begin
        target = image[begin : begin + place.num_bytes].view(place.dtype).view(place.box.shape)
        target.copy_(piece.tensor.detach(), non_blocking=on_gpu)
    if on_gpu:
        torch.cuda.synchronize()
    return StagedFile(file=file, image=image, header_bytes=len(header), num_bytes=num_bytes, pieces=tuple(staged))


def write_file(root: Path, staged: StagedFile) -> PieceTable:
    """Write a tensor file and make it durable, and hash it while the disk is at work.

    Raises:
        CheckpointError: it cannot be written; names file and reason. What there is of it is left to the caller.
    """
    path, image = root / staged.file, staged.image.numpy().data
    begins = [0, *(staged.header_bytes + piece.begin for piece in staged.pieces)]
    sizes = [staged.header_bytes, *(piece.num_bytes for piece in staged.pieces)]
    with ThreadPoolExecutor(1) as hasher:
        digests = hasher.map(lambda begin, size: xxh3_128(image[begin : begin + size]).hexdigest(), begins, sizes)
        try:
            try:
                _write_image(path, image, staged.num_bytes, direct=True)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # This file system has only buffered writing.
                _write_image(path, image, staged.num_bytes, direct=False)
        except OSError as error:
            raise CheckpointError(
                f"cannot write {path}: {error.strerror}. Earlier checkpoints are as they were."
            ) from error
        return _table(staged, list(digests))


class TensorFile:
    """A tensor file to read boxes from. The bytes of a piece are compared with its hash once a process."""

    def __init__(self, path: Path, table: PieceTable) -> None:
        self.path = path
        self.table = table
        self._is_header_verified = False
        self._verified: set[StoredPiece] = set()
        self._pieces: dict[str, list[StoredPiece]] = {}
        for piece in table.pieces:
            self._pieces.setdefault(piece.name, []).append(piece)

    def pieces_of(self, name: str) -> list[StoredPiece]:
        """The boxes of a logical tensor that are in this file."""
        return self._pieces.get(name, [])

    def read(self, piece: StoredPiece, box: Box) -> Tensor:
        """The part of a piece that `box` (inside it, not empty) asks for, shaped like the box.

        Raises:
            CheckpointError: the file is missing, truncated, or its bytes are not those that were saved.
        """
        dtype = DTYPES[piece.dtype]
        rows = _whole_rows(piece, box)
        with self._opened() as descriptor:
            if not self._is_header_verified:
                self._refuse(self._header_fault(descriptor))
                self._is_header_verified = True
            if piece not in self._verified:
                # Bytes are hashed as they are read, so what was checked is what is returned.
                data, digest = _read(descriptor, piece.begin, piece.num_bytes)
                self._refuse(self._piece_fault(piece, digest))
                self._verified.add(piece)
                rows = Box(piece.offset, piece.shape)
            else:
                skipped = math.prod(rows.offset[:1]) - math.prod(piece.offset[:1])
                row_bytes = dtype.itemsize * math.prod(piece.shape[1:])
                data = _read_range(descriptor, piece.begin + skipped * row_bytes, rows.num_elements * dtype.itemsize)
        return data.view(dtype).view(rows.shape)[box.slices_in(rows)]

    def check_size(self) -> None:
        """Compare what the directory says with what was saved; no contents are read.

        Raises:
            CheckpointError: the file is missing or has another size.
        """
        with self._opened():
            pass

    def faults(self) -> list[str]:
        """Compare every byte with its hash, in little memory; a sentence for each damaged place."""
        try:
            with self._opened() as descriptor:
                pieces = (
                    self._piece_fault(piece, _digest_of_range(descriptor, piece.begin, piece.num_bytes))
                    for piece in self.table.pieces
                )
                return [fault for fault in (self._header_fault(descriptor), *pieces) if fault]
        except CheckpointError as error:
            return [str(error)]

    @contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                found = os.fstat(descriptor).st_size
                if found != self.table.num_bytes:
                    raise CheckpointError(f"{self.path} has {found} bytes and was saved with {self.table.num_bytes}")
                yield descriptor
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error

    def _header_fault(self, descriptor: int) -> str | None:
        if _digest_of_range(descriptor, 0, self.table.header_bytes) == self.table.header_xxh3:
            return None
        return f"{self.path}: the header is damaged (its bytes are not those that were saved)"

    def _piece_fault(self, piece: StoredPiece, digest: str) -> str | None:
        if digest == piece.xxh3:
            return None
        box = Box(piece.offset, piece.shape)
        return f"{self.path}: tensor {piece.name}{box} is damaged (its bytes are not those that were saved)"

    @staticmethod
    def _refuse(fault: str | None) -> None:
        if fault:
            raise CheckpointError(f"{fault}. Use an older checkpoint.")


def _laid_out(pieces: Sequence[Piece]) -> list[StagedPiece]:
    staged: list[StagedPiece] = []
    begin = 0
    for piece in pieces:
        tensor, box = piece.tensor, Box(piece.offset, tuple(piece.tensor.shape))
        if tensor.dtype not in DTYPE_CODES or not box.is_inside(piece.global_shape):
            raise ValueError(f"{piece.name}{box} of {tensor.dtype} is no box of a tensor of shape {piece.global_shape}")
        num_bytes = tensor.numel() * tensor.element_size()
        staged.append(
            StagedPiece(
                name=piece.name,
                dtype=tensor.dtype,
                global_shape=piece.global_shape,
                box=box,
                begin=begin,
                num_bytes=num_bytes,
            )
        )
        begin += num_bytes
    if len({piece.key for piece in staged}) < len(staged):
        raise ValueError("a rank gave two pieces of one tensor that start at the same place")
    return staged


def _header(pieces: Sequence[StagedPiece]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for piece in pieces:
        entries[piece.key] = {
            "dtype": DTYPE_CODES[piece.dtype],
            "shape": piece.box.shape,
            "data_offsets": [piece.begin, piece.begin + piece.num_bytes],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_image(path: Path, image: memoryview, num_bytes: int, *, direct: bool) -> None:
    # Past the page cache: that costs no processor time, and the data being trained on stays cached.
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | (os.O_DIRECT if direct else 0)
    descriptor = os.open(path, flags, 0o644)
    try:
        while image:
            image = image[os.write(descriptor, image[:_WRITE_BYTES]) :]
        os.ftruncate(descriptor, num_bytes)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _table(staged: StagedFile, digests: Sequence[str]) -> PieceTable:
    return PieceTable(
        file=staged.file,
        num_bytes=staged.num_bytes,
        header_bytes=staged.header_bytes,
        header_xxh3=digests[0],
        pieces=tuple(
            StoredPiece(
                name=piece.name,
                dtype=DTYPE_CODES[piece.dtype],
                global_shape=piece.global_shape,
                offset=piece.box.offset,
                shape=piece.box.shape,
                begin=staged.header_bytes + piece.begin,
                num_bytes=piece.num_bytes,
                xxh3=digest,
            )
            for piece, digest in zip(staged.pieces, digests[1:], strict=True)
        ),
    )


def _whole_rows(piece: StoredPiece, box: Box) -> Box:
    return Box((*box.offset[:1], *piece.offset[1:]), (*box.shape[:1], *piece.shape[1:]))


def _read(descriptor: int, begin: int, num_bytes: int) -> tuple[Tensor, str]:
    data = torch.empty(num_bytes, dtype=torch.uint8)
    digest = xxh3_128()
    for chunk in _chunks_read(descriptor, begin, data.numpy().data):
        digest.update(chunk)
    return data, digest.hexdigest()


def _read_range(descriptor: int, begin: int, num_bytes: int) -> Tensor:
    data = torch.empty(num_bytes, dtype=torch.uint8)
    for _ in _chunks_read(descriptor, begin, data.numpy().data):
        pass
    return data


def _digest_of_range(descriptor: int, begin: int, num_bytes: int) -> str:
    digest, buffer = xxh3_128(), memoryview(bytearray(min(num_bytes, _READ_BYTES)))
    end = begin + num_bytes
    while begin < end:
        for chunk in _chunks_read(descriptor, begin, buffer[: end - begin]):
            digest.update(chunk)
            begin += len(chunk)
    return digest.hexdigest()


def _chunks_read(descriptor: int, begin: int, target: memoryview) -> Iterator[memoryview]:
    """Fill `target` from the file, yielding each part of it while it is still in the processor's cache."""
    while target:
        count = os.preadv(descriptor, [target[:_READ_BYTES]], begin)
        if count == 0:
            raise OSError(errno.EIO, "the file ended early")
        yield target[:count]
        target, begin = target[count:], begin + count
