"""What a prepared dataset consists of: `dataset.json` (the manifest) and `index.parquet` (its shards).

dataset.json    written last, by rename: a folder without it is not a dataset
index.parquet   split, path, num_documents, num_tokens, num_bytes, sha256 of every shard
train/, held_out/   shards: parquet, a row a document, `id: string`, `tokens: list<uint16 or uint32>`
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from conf.errors import DataError

FORMAT_VERSION = 1
MANIFEST_NAME = "dataset.json"
INDEX_NAME = "index.parquet"

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")

INDEX_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("path", pa.string()),
        ("num_documents", pa.int64()),
        ("num_tokens", pa.int64()),
        ("num_bytes", pa.int64()),
        ("sha256", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """A shard as the index describes it; `path` is relative to the dataset, `num_bytes` its size as stored."""

    split: Split
    path: str
    num_documents: int
    num_tokens: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """Sums over the shards of a split."""

    num_shards: int
    num_documents: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class InputRecord:
    """A file the dataset was made from."""

    path: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What `dataset.json` holds.

    Attributes:
        format_version: of the layout described at the top of this file.
        identity: sha256 over the index and the tokenizer; two datasets of one identity hold the same tokens.
        tokenizer_sha256: of the `tokenizer.json` that made the tokens.
        vocab_size: all tokens are below it.
        end_of_text_id: the token that ends every document.
        held_out_fraction: share of documents that were held out, by hash of their content.
        num_duplicates: documents dropped because another of the same content came before.
        splits: sums by split.
        inputs: lineage.
    """

    format_version: int
    identity: str
    tokenizer_sha256: str
    vocab_size: int
    end_of_text_id: int
    held_out_fraction: float
    num_duplicates: int
    splits: dict[Split, Totals]
    inputs: tuple[InputRecord, ...]

    def to_json(self) -> bytes:
        """The text of `dataset.json`."""
        return (json.dumps(asdict(self), indent=2) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes, name: str) -> Manifest:
        """The inverse of `to_json`.

        Raises:
            DataError: it is not a manifest, or of another version of the format.
        """
        try:
            record = json.loads(content)
            version = record["format_version"]
            if version != FORMAT_VERSION:
                raise DataError(
                    f"{name}: format version {version}; this program reads version {FORMAT_VERSION}. Prepare it anew."
                )
            record["splits"] = {split: Totals(**record["splits"][split]) for split in SPLITS}
            record["inputs"] = tuple(InputRecord(**entry) for entry in record["inputs"])
            return cls(**record)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{name}: damaged manifest ({error!r}). Copy the dataset again or prepare it anew."
            ) from error


class SplitIndex:
    """The shards of a split, in the order of their tokens.

    Attributes:
        first_token: int64 position of each shard's first token in the split; one more entry, the total.
        first_document: likewise for documents.
    """

    def __init__(self, table: pa.Table, split: Split) -> None:
        self._table = table
        self._split = split
        self.first_token = _starts(table.column("num_tokens"))
        self.first_document = _starts(table.column("num_documents"))

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def entry(self, number: int) -> ShardEntry:
        """The shard of this number in the split."""
        values = {name: self._table.column(name)[number].as_py() for name in INDEX_SCHEMA.names if name != "split"}
        return ShardEntry(split=self._split, **values)

    @property
    def totals(self) -> Totals:
        """Sums over the shards."""
        return Totals(
            num_shards=len(self),
            num_documents=int(self.first_document[-1]),
            num_tokens=int(self.first_token[-1]),
        )


def identity_of(entries: Sequence[ShardEntry], tokenizer_sha256: str) -> str:
    """Identity of a dataset: sha256 over its index, in order, and its tokenizer."""
    digest = hashlib.sha256(f"{FORMAT_VERSION} {tokenizer_sha256}\n".encode())
    for entry in entries:
        row = [getattr(entry, name) for name in INDEX_SCHEMA.names]
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def index_bytes(entries: Sequence[ShardEntry]) -> bytes:
    """The bytes of `index.parquet`."""
    columns = {name: [getattr(entry, name) for entry in entries] for name in INDEX_SCHEMA.names}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=INDEX_SCHEMA), sink, compression="zstd")
    content: bytes = sink.getvalue().to_pybytes()
    return content


def read_index(content: bytes, manifest: Manifest, name: str) -> dict[Split, SplitIndex]:
    """The shards of each split, held against the manifest.

    Raises:
        DataError: the index cannot be read, is not the one the manifest was written with, has a path that leaves the
            dataset, or a number that cannot be.
    """
    try:
        table = pq.read_table(pa.BufferReader(content)).select(INDEX_SCHEMA.names).cast(INDEX_SCHEMA)
        entries = [ShardEntry(**row) for row in table.to_pylist()]
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{name}: not an index ({error}). Copy the dataset again or prepare it anew.") from error
    for entry in entries:
        _check(entry, name)
    if len({entry.path for entry in entries}) != len(entries):
        raise DataError(f"{name}: names a shard twice. Prepare the dataset anew.")
    if identity_of(entries, manifest.tokenizer_sha256) != manifest.identity:
        raise DataError(
            f"{name}: does not belong to the {MANIFEST_NAME} beside it (identity {manifest.identity[:12]}...). "
            "One of the two was changed or copied from elsewhere: copy the dataset again or prepare it anew."
        )
    splits = {}
    for split in SPLITS:
        rows = [number for number, entry in enumerate(entries) if entry.split == split]
        splits[split] = SplitIndex(table.take(pa.array(rows, pa.int64())).combine_chunks(), split)
        if splits[split].totals != manifest.splits[split]:
            raise DataError(
                f"{name}: {splits[split].totals} in {split}, and {MANIFEST_NAME} says {manifest.splits[split]}."
            )
    return splits


def _check(entry: ShardEntry, name: str) -> None:
    if entry.split not in SPLITS:
        raise DataError(f"{name}: unknown split '{entry.split}'; the splits are {', '.join(SPLITS)}.")
    path = PurePosixPath(entry.path)
    if path.is_absolute() or "\\" in entry.path or path.as_posix() != entry.path or path.parts[:1] != (entry.split,):
        raise DataError(f"{name}: shard path '{entry.path}' is not a plain path inside the folder '{entry.split}'.")
    if ".." in path.parts:
        raise DataError(f"{name}: shard path '{entry.path}' leaves the dataset.")
    if min(entry.num_documents, entry.num_tokens, entry.num_bytes) < 1:
        raise DataError(
            f"{name}: shard {entry.path} has {entry.num_documents} documents, {entry.num_tokens} tokens and "
            f"{entry.num_bytes} bytes; each must be at least 1."
        )


def _starts(counts: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts.to_numpy(), out=starts[1:])
    return starts
