"""What a checkpoint says about itself: its manifest, and the table of pieces beside each tensor file. JSON, no torch.

Decoding is strict. A field added to anything below, ModelConfig and EngineConfig included, needs a new FORMAT_VERSION
and a line in `decode_manifest` that says what older manifests meant.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Final, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from conf.errors import CheckpointError
from conf.schema import EngineConfig, ModelConfig

FORMAT_VERSION: Final = 1
MANIFEST = "manifest.json"

HalfName = Literal["weights", "resume"]
DtypeCode = Literal["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Xxh3 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
# A name that could leave the checkpoint's directory does not fit the pattern.
FileName = Annotated[str, Field(pattern=r"^(weights|resume)/rank-[0-9]{5,}\.safetensors$")]
Size = Annotated[int, Field(ge=0)]
Indices = tuple[Size, ...]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Parent:
    """A checkpoint that this one was made from.

    Attributes:
        path: where it was; for people, never opened.
        manifest_sha256: which it was: the digest in its manifest, which covers every hash of every piece.
    """

    path: str
    manifest_sha256: Sha256


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Where a checkpoint comes from. The same on every rank and for every checkpoint of a stage.

    Attributes:
        run: name of the run.
        recipe: name of the recipe.
        stage: name of the stage.
        model: shape of the model.
        engine: how it was spread when this was written; any layout reads it.
        tokenizer: sha256 of the tokenizer: what token ids mean.
        data: source -> identity of its prepared data: what sample numbers mean.
        parents: lineage, nearest first; empty for fresh weights.
    """

    run: str
    recipe: str
    stage: str
    model: ModelConfig
    engine: EngineConfig
    tokenizer: str
    data: dict[str, str]
    parents: tuple[Parent, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredPiece:
    """One box of one logical tensor in a tensor file.

    Attributes:
        name: of the logical tensor; its key in the file is `NAME@OFFSET`.
        dtype: as safetensors writes it, e.g. `BF16`.
        global_shape: of the whole logical tensor.
        offset: first index of the box in each dimension.
        shape: of the box.
        begin: first byte in the file.
        num_bytes: of the box.
        xxh3: 128-bit hash of those bytes.
    """

    name: str
    dtype: DtypeCode
    global_shape: Indices
    offset: Indices
    shape: Indices
    begin: Size
    num_bytes: Size
    xxh3: Xxh3


@dataclass(frozen=True, kw_only=True, slots=True)
class PieceTable:
    """What is in one tensor file, byte for byte: a header, then pieces without gaps. Written beside it as JSON."""

    file: FileName
    num_bytes: Size
    header_bytes: Size
    header_xxh3: Xxh3
    pieces: tuple[StoredPiece, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """A tensor file, and the digest of its piece table."""

    file: FileName
    num_bytes: Size
    table_sha256: Sha256


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A logical tensor, and the numbers of the files that hold pieces of it."""

    dtype: DtypeCode
    shape: Indices
    files: Indices


@dataclass(frozen=True, kw_only=True, slots=True)
class Half:
    """All files and tensors of `weights/` or of `resume/`."""

    files: tuple[StoredFile, ...]
    tensors: dict[str, StoredTensor]

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            if any(file >= len(self.files) for file in tensor.files):
                raise ValueError(f"tensor {name} refers to a file beyond the {len(self.files)} listed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The whole of a checkpoint, but for the piece tables.

    Attributes:
        step: optimizer steps completed in the stage.
        samples: consumed by the stage: the position of its data stream.
        tokens: trained on in the stage.
        saved_at: unix seconds.
        provenance: where it comes from.
        weights: the model.
        resume: what else training needs to go on as if it had not stopped.
    """

    format_version: Literal[1]
    step: Size
    samples: Size
    tokens: Size
    saved_at: float
    provenance: Provenance
    weights: Half
    resume: Half

    @property
    def num_bytes(self) -> int:
        """Size of all tensor files."""
        return sum(file.num_bytes for half in (self.weights, self.resume) for file in half.files)


def file_name(half: HalfName, rank: int) -> str:
    """Name of a rank's tensor file inside the checkpoint."""
    return f"{half}/rank-{rank:05d}.safetensors"


def table_path(root: Path, file: str) -> Path:
    """Where the piece table of a tensor file is."""
    return (root / file).with_suffix(".json")


def encode_manifest(manifest: Manifest) -> bytes:
    """Canonical JSON, sealed with the digest of everything else in it."""
    body = asdict(manifest)
    return _canonical({**body, "sha256": hashlib.sha256(_canonical(body)).hexdigest()})


def decode_manifest(text: bytes, path: Path) -> tuple[Manifest, str]:
    """The manifest and its digest; `path` is for messages.

    Raises:
        CheckpointError: a byte is not as it was written, or another version of the format wrote it.
    """
    try:
        body = json.loads(text)
        digest = body.pop("sha256")
        version = body["format_version"]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is not the manifest of a checkpoint ({error!r}); use an older one.") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version}; this version reads {FORMAT_VERSION}.")
    if digest != hashlib.sha256(_canonical(body)).hexdigest():
        raise CheckpointError(f"{path} is damaged: its contents do not have the digest it ends with; use an older one.")
    return _decode(_manifests(), _canonical(body), path), digest


def encode_table(table: PieceTable) -> bytes:
    """Canonical JSON."""
    return _canonical(asdict(table))


def decode_table(text: bytes, path: Path) -> PieceTable:
    """The table that `encode_table` wrote; `path` is for messages.

    Raises:
        CheckpointError: it is not a piece table.
    """
    return _decode(_tables(), text, path)


def write_durably(path: Path, contents: bytes) -> None:
    """The file appears under its name at once and whole; `sync_directory` then makes the name durable as well.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    draft = path.with_name(path.name + ".draft")
    try:
        with draft.open("wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def sync_directory(path: Path) -> None:
    """Make names created, renamed and removed in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _decode(adapter: TypeAdapter[T], text: bytes, path: Path) -> T:
    try:
        return adapter.validate_json(text, strict=True)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise CheckpointError(f"{path} does not fit the format: {faults}") from error


@cache
def _manifests() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


@cache
def _tables() -> TypeAdapter[PieceTable]:
    return TypeAdapter(PieceTable)
