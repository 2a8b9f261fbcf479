"""What a prepared dataset consists of, and how little of it must be read to open it.

dataset.json             the manifest, written last: a folder without it is not a dataset
SPLIT/index.parquet      the root: a row for each part, with the part's sums and sha256
SPLIT/index/N.parquet    parts: a row for each of some shards, with the hash of every block in it
SPLIT/shards/N.arrow     shards: Arrow IPC files, a record batch (block) of `block_tokens + 1` tokens at a time
SPLIT/documents/N.parquet   which documents a shard holds: id, source, first token, number of tokens

Tokens of all documents one after another are cut into blocks of equal length, blocks make up shards and shards make up
parts of equal length, so the place of a token is arithmetic and memory does not grow with the dataset. Each block
repeats the first token of the next one: windows of `sequence_length + 1` tokens need no second block.

Blocks are Arrow IPC, not parquet: a record batch can be decoded from its own bytes, without the footer, and keeps
16-bit tokens as 16 bits (2 to 4 times less CPU than parquet, and smaller).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from conf.errors import DataError
from data.tables import numbers, read_table

FORMAT_VERSION = 2
MANIFEST_NAME = "dataset.json"
PART_SHARDS = 256
"""Shards of the parts that are written; datasets may have others. The root of 8 million shards and a part are about
equally long, so a rank that starts reads little more than the hashes of what it needs."""
HASH_BYTES = 16
GROUP_BLOCKS = 4
"""Neighbouring blocks that are read by one request where they are needed together: a request costs the reader as much
CPU as receiving half of a block."""
FORGOTTEN_ID = "(forgotten)"
"""Stands for a document that was taken out; its tokens are all end-of-text."""

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")

ROOT_SCHEMA = pa.schema(
    [
        ("num_shards", pa.int64()),
        ("num_documents", pa.int64()),
        ("num_tokens", pa.int64()),
        ("num_bytes", pa.int64()),
        ("part_bytes", pa.int64()),
        ("part_sha256", pa.binary(32)),
    ]
)
PART_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("num_documents", pa.int64()),
        ("num_tokens", pa.int64()),
        ("num_bytes", pa.int64()),
        ("documents_sha256", pa.binary(32)),
        ("storage_class", pa.dictionary(pa.int8(), pa.string())),
        ("block_starts", pa.list_(pa.int64())),
        ("block_hashes", pa.list_(pa.binary(HASH_BYTES))),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """A shard as the index describes it.

    Attributes:
        path: relative to the dataset.
        num_documents: that begin in it.
        num_tokens: of its blocks, repeated ones not counted.
        num_bytes: as stored.
        documents_sha256: of the table of its documents.
        storage_class: of the object when it was indexed, in S3's terms; STANDARD for local files.
        block_starts: byte of the shard at which each block starts; one more entry, the end of the last.
        block_hashes: XXH3-128 of each block.
    """

    path: str
    num_documents: int
    num_tokens: int
    num_bytes: int
    documents_sha256: bytes
    storage_class: str
    block_starts: tuple[int, ...]
    block_hashes: tuple[bytes, ...]


class BlockRef(NamedTuple):
    """Where a block is and what it must be.

    Attributes:
        path: of its shard, relative to the dataset.
        start: first byte of its record batch in the shard.
        num_bytes: of its record batch.
        digest: XXH3-128 of those bytes.
    """

    path: str
    start: int
    num_bytes: int
    digest: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """Sums over the shards of a split."""

    num_shards: int
    num_documents: int
    num_tokens: int
    num_bytes: int


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
        identity: sha256 over the roots of the index; datasets of one identity hold the same tokens.
        tokenizer_sha256: of the `tokenizer.json` that made the tokens.
        vocab_size: all tokens are below it.
        end_of_text_id: the token that ends every document.
        held_out_fraction: share of documents that were held out, by hash of their content.
        num_duplicates: documents dropped because another of the same content came before.
        block_tokens: tokens of a block.
        shard_blocks: blocks of a shard.
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
    block_tokens: int
    shard_blocks: int
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
            manifest = cls(**record)
            if min(manifest.block_tokens, manifest.shard_blocks, manifest.vocab_size) < 1:
                raise ValueError("a size below 1")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{name}: damaged manifest ({error!r}). Copy the dataset again or prepare it anew."
            ) from error
        return manifest

    @property
    def token_type(self) -> pa.DataType:
        """Arrow type of tokens."""
        return pa.uint16() if self.vocab_size <= 1 << 16 else pa.uint32()


def identity_of(manifest: Manifest, roots: Sequence[bytes | memoryview]) -> str:
    """Identity of a dataset: sha256 over what gives its tokens their meaning and over the roots of its index."""
    facts = [FORMAT_VERSION, manifest.tokenizer_sha256, manifest.vocab_size, manifest.end_of_text_id]
    digest = hashlib.sha256(json.dumps([*facts, manifest.block_tokens, manifest.shard_blocks]).encode())
    for root in roots:
        digest.update(hashlib.sha256(root).digest())
    return digest.hexdigest()


def root_name(split: Split) -> str:
    """Name of the root of a split's index."""
    return f"{split}/index.parquet"


def part_name(split: Split, part: int) -> str:
    """Name of a part of a split's index."""
    return f"{split}/index/{part:06d}.parquet"


def documents_name(shard_path: str) -> str:
    """Name of the table of a shard's documents."""
    split, _, name = shard_path.split("/", 2)
    return f"{split}/documents/{name.removesuffix('.arrow')}.parquet"


def table_bytes(table: pa.Table, **settings: Any) -> bytes:
    """A table as the bytes of a parquet file, with the settings of `pyarrow.parquet.write_table`."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **({"compression": "zstd"} | settings))
    content: bytes = sink.getvalue().to_pybytes()
    return content


def part_bytes(entries: Sequence[ShardEntry]) -> bytes:
    """The bytes of a part of the index."""
    columns = {name: [getattr(entry, name) for entry in entries] for name in PART_SCHEMA.names}
    return _index_bytes(pa.table(columns, schema=PART_SCHEMA), "block_starts.list.element")


def part_row(entries: Sequence[ShardEntry], content: bytes) -> dict[str, object]:
    """The row of the root that stands for a part."""
    return {
        "num_shards": len(entries),
        "num_documents": sum(entry.num_documents for entry in entries),
        "num_tokens": sum(entry.num_tokens for entry in entries),
        "num_bytes": sum(entry.num_bytes for entry in entries),
        "part_bytes": len(content),
        "part_sha256": hashlib.sha256(content).digest(),
    }


def root_bytes(rows: Sequence[dict[str, object]]) -> bytes:
    """The bytes of the root of an index."""
    return _index_bytes(pa.Table.from_pylist(list(rows), schema=ROOT_SCHEMA), *ROOT_SCHEMA.names[:5])


class Root:
    """The parts of a split's index.

    Attributes:
        part_shards: shards of a part, but for the last, which may have fewer.
        first_document: int64 number of each part's first document; one more entry, the total.
        totals: sums over the split.
    """

    def __init__(self, content: bytes | memoryview, manifest: Manifest, split: Split, name: str) -> None:
        """Read a root and hold it against the manifest.

        Raises:
            DataError: it cannot be read, or its numbers do not add up.
        """
        table = _table(content, ROOT_SCHEMA, name)
        sums = {field: numbers(table.column(field)) for field in ROOT_SCHEMA.names[:5]}
        if any(int(column.min(initial=1)) < (field != "num_documents") for field, column in sums.items()):
            raise DataError(f"{name}: a part with a number that cannot be (negative or 0). Prepare the dataset anew.")
        self.totals = Totals(**{field: int(sums[field].sum()) for field in Totals.__dataclass_fields__})
        if self.totals != manifest.splits[split]:
            raise DataError(
                f"{name}: {self.totals} in {split}, and {MANIFEST_NAME} says {manifest.splits[split]}. "
                "Copy the dataset again or prepare it anew."
            )
        self.part_shards = int(sums["num_shards"].max(initial=1))
        if (sums["num_shards"][:-1] != self.part_shards).any():
            raise DataError(f"{name}: a part before the last does not have {self.part_shards} shards.")
        self.first_document = np.concatenate([[0], np.cumsum(sums["num_documents"])])
        self._rows = sums
        self._sha256 = table.column("part_sha256")

    def sums(self, part: int) -> Totals:
        """What a part adds up to."""
        return Totals(**{field: int(self._rows[field][part]) for field in Totals.__dataclass_fields__})

    def sha256(self, part: int) -> bytes:
        """Hash of a part."""
        digest: bytes = self._sha256[part].as_py()
        return digest


class Part:
    """A part of the index, about 30 bytes a block in memory.

    Attributes:
        first_document: int64 number of each shard's first document within the part; one more entry, the total.
        num_tokens: int64 tokens of each shard.
        num_bytes: int64 bytes of each shard.
    """

    def __init__(self, content: bytes | memoryview, root: Root, split: Split, number: int, name: str) -> None:
        """Read a part and hold it against the root.

        Raises:
            DataError: it is not the part the root was written with, has a path that leaves the dataset, or a number
                that cannot be.
        """
        if hashlib.sha256(content).digest() != root.sha256(number):
            raise DataError(
                f"{name}: does not belong to {root_name(split)} (another sha256). One of the two was changed or copied "
                "from elsewhere: copy the dataset again or prepare it anew."
            )
        table = _table(content, PART_SCHEMA, name)
        self._table = table
        self.num_tokens = numbers(table.column("num_tokens"))
        self.num_bytes = numbers(table.column("num_bytes"))
        documents = numbers(table.column("num_documents"))
        self.first_document: npt.NDArray[np.int64] = np.concatenate([[0], np.cumsum(documents)])
        starts, hashes = table.column("block_starts").chunk(0), table.column("block_hashes").chunk(0)
        self._start_offsets = numbers(starts.offsets)
        self._starts = numbers(starts.values)
        self._hash_offsets = numbers(hashes.offsets)
        self._hashes = _fixed_binary(hashes.values)
        self._paths: list[str] = table.column("path").to_pylist()
        self._check(split, root.sums(number), documents, name)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def entry(self, shard: int) -> ShardEntry:
        """A shard, by its number in the part."""
        row: dict[str, Any] = self._table.slice(shard, 1).to_pylist()[0]
        row["block_starts"], row["block_hashes"] = tuple(row["block_starts"]), tuple(row["block_hashes"])
        return ShardEntry(**row)

    def path(self, shard: int) -> str:
        """Path of a shard, by its number in the part."""
        return self._paths[shard]

    def block(self, shard: int, block: int) -> BlockRef:
        """A block, by its number in the shard, which is given by its number in the part."""
        first = int(self._start_offsets[shard]) + block
        start, end = int(self._starts[first]), int(self._starts[first + 1])
        place = HASH_BYTES * (int(self._hash_offsets[shard]) + block)
        return BlockRef(self._paths[shard], start, end - start, bytes(self._hashes[place : place + HASH_BYTES]))

    def _check(self, split: Split, sums: Totals, documents: npt.NDArray[np.int64], name: str) -> None:
        smallest = min(int(self.num_tokens.min()), int(self.num_bytes.min()), int(documents.min()) + 1)
        if smallest < 1:
            raise DataError(f"{name}: a shard with tokens, bytes or documents that cannot be (negative or 0).")
        found = Totals(
            num_shards=self._table.num_rows,
            num_documents=int(documents.sum()),
            num_tokens=int(self.num_tokens.sum()),
            num_bytes=int(self.num_bytes.sum()),
        )
        if found != sums:
            raise DataError(f"{name}: {found}, and {root_name(split)} says {sums}. Prepare the dataset anew.")
        # Nothing else than a name, so that no path leaves the dataset.
        is_shard = re.compile(rf"{split}/shards/[^/\\]+\.arrow").fullmatch
        if strange := next((path for path in self._paths if not is_shard(path)), None):
            raise DataError(
                f"{name}: shard path '{strange}' is not of the form {split}/shards/NAME.arrow: it is not a plain path, "
                "leaves the dataset or is of another split. Prepare the dataset anew."
            )
        if len(set(self._paths)) != len(self._paths):
            raise DataError(f"{name}: names a shard twice. Prepare the dataset anew.")


def _index_bytes(table: pa.Table, *integers: str) -> bytes:
    """As `table_bytes`, encoded to be decoded sooner: hashes do not compress, and of integers differences are kept."""
    encoding = dict.fromkeys(integers, "DELTA_BINARY_PACKED")
    return table_bytes(table, compression="none", use_dictionary=False, column_encoding=encoding)


def _fixed_binary(values: pa.FixedSizeBinaryArray) -> memoryview:
    """The bytes of all values, one after another."""
    width = values.type.byte_width
    return memoryview(values.buffers()[1])[values.offset * width :]


def _table(content: bytes | memoryview, schema: pa.Schema, name: str) -> pa.Table:
    try:
        table = read_table(content).select(schema.names)
        # To cast is to import all of pyarrow.compute.
        table = table if table.schema.equals(schema) else table.cast(schema)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{name}: not an index ({error}). Copy the dataset again or prepare it anew.") from error
    if any(column.null_count for column in table.columns):
        raise DataError(f"{name}: an index with values missing. Copy the dataset again or prepare it anew.")
    return table.combine_chunks()
