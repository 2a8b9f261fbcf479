"""Writing a dataset: documents of tokens come in, blocks, shards, index and manifest go out."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from data.index import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    PART_SHARDS,
    SPLITS,
    InputRecord,
    Manifest,
    ShardEntry,
    Split,
    Totals,
    documents_name,
    identity_of,
    part_bytes,
    part_name,
    part_row,
    root_bytes,
    root_name,
    table_bytes,
)
from data.storage import Store

BLOCK_TOKENS = 1 << 18
SHARD_BLOCKS = 128
MAGIC_BYTES = 8
SHARD_DIGITS = 8
"""The name of a shard begins with its number in the split."""

Tokens = npt.NDArray[np.uint16 | np.uint32]
DOCUMENTS_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("number", pa.int64()),
        ("first_token", pa.int64()),
        ("num_tokens", pa.int64()),
    ]
)

ROW_FIELD = pa.field("row", pa.int64())
"""Also there where the row of the source is kept: row of parquet, from 0; line of jsonl, from 1; 0 for a text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetFacts:
    """What a manifest says besides sums; see `Manifest`."""

    tokenizer_sha256: str
    vocab_size: int
    end_of_text_id: int
    held_out_fraction: float
    block_tokens: int = BLOCK_TOKENS
    shard_blocks: int = SHARD_BLOCKS

    @property
    def dtype(self) -> npt.DTypeLike:
        """Type of a token."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32


@dataclass(slots=True)
class _SplitState:
    """A split being written."""

    pending: list[Tokens] = field(default_factory=list)
    num_pending: int = 0
    blocks: list[Tokens] = field(default_factory=list)
    documents: list[dict[str, object]] = field(default_factory=list)
    num_documents: int = 0
    num_tokens: int = 0
    first_token_of_shard: int = 0
    num_shards: int = 0


@dataclass(slots=True)
class _SplitIndex:
    """The index of a split being written."""

    entries: list[ShardEntry] = field(default_factory=list)
    part_rows: list[dict[str, object]] = field(default_factory=list)


class IndexWriter:
    """Writes the index and the manifest of a dataset whose shards are written, each split's in order."""

    def __init__(self, store: Store, facts: DatasetFacts) -> None:
        self._store = store
        self._facts = facts
        self._splits: dict[Split, _SplitIndex] = {split: _SplitIndex() for split in SPLITS}

    def add(self, split: Split, entry: ShardEntry) -> None:
        """Append a shard.

        Raises:
            DataError: a part of the index cannot be written.
        """
        index = self._splits[split]
        index.entries.append(entry)
        if len(index.entries) == PART_SHARDS:
            self._write_part(split, index)

    def finish(self, *, num_duplicates: int, inputs: Sequence[InputRecord]) -> Manifest:
        """Write what is open, the roots and the manifest.

        Raises:
            DataError: something cannot be written.
        """
        roots = []
        totals: dict[Split, Totals] = {}
        for split, index in self._splits.items():
            if index.entries:
                self._write_part(split, index)
            roots.append(root_bytes(index.part_rows))
            self._store.write(root_name(split), roots[-1])
            totals[split] = totals_of(index.part_rows)
        facts = self._facts
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            identity="",
            tokenizer_sha256=facts.tokenizer_sha256,
            vocab_size=facts.vocab_size,
            end_of_text_id=facts.end_of_text_id,
            held_out_fraction=facts.held_out_fraction,
            num_duplicates=num_duplicates,
            block_tokens=facts.block_tokens,
            shard_blocks=facts.shard_blocks,
            splits=totals,
            inputs=tuple(inputs),
        )
        manifest = replace(manifest, identity=identity_of(manifest, roots))
        self._store.write(MANIFEST_NAME, manifest.to_json())
        return manifest

    def _write_part(self, split: Split, index: _SplitIndex) -> None:
        content = part_bytes(index.entries)
        self._store.write(part_name(split, len(index.part_rows)), content)
        index.part_rows.append(part_row(index.entries, content))
        index.entries = []


class DatasetWriter:
    """Writes one dataset into a store; holds one shard of each split in memory.

    Attributes:
        facts: what the dataset is.
    """

    def __init__(self, store: Store, facts: DatasetFacts) -> None:
        self.facts = facts
        self._store = store
        self._index = IndexWriter(store, facts)
        self._states: dict[Split, _SplitState] = {split: _SplitState() for split in SPLITS}

    def num_documents(self, split: Split) -> int:
        """Documents of a split so far."""
        return self._states[split].num_documents

    def add(self, split: Split, document_id: str, source: str, tokens: npt.NDArray[np.integer]) -> None:
        """Append a document; its end-of-text token is added here.

        Raises:
            ValueError: a token is no whole number, negative or not below the vocabulary's size; names the document.
            DataError: a shard cannot be written.
        """
        if not np.issubdtype(tokens.dtype, np.integer):
            # Fractions would be cut off, and a NaN is neither above nor below anything.
            raise ValueError(f"document {document_id}: tokens are {tokens.dtype}, must be whole numbers")
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.facts.vocab_size:
            raise ValueError(f"document {document_id}: tokens from {tokens.min()} to {tokens.max()}, must be in "
                             f"[0, {self.facts.vocab_size})")  # fmt: skip
        state = self._states[split]
        values: Tokens = np.full(len(tokens) + 1, self.facts.end_of_text_id, self.facts.dtype)
        values[:-1] = tokens
        state.documents.append(
            {
                "id": document_id,
                "source": source,
                "number": state.num_documents,
                "first_token": state.num_tokens,
                "num_tokens": len(values),
            }
        )
        state.num_documents += 1
        state.num_tokens += len(values)
        state.pending.append(values)
        state.num_pending += len(values)
        if state.num_pending > self.facts.block_tokens:
            self._cut(split, state)

    def finish(self, *, num_duplicates: int, inputs: Sequence[InputRecord]) -> Manifest:
        """Write what is open, the index and the manifest.

        Raises:
            DataError: something cannot be written.
        """
        for split, state in self._states.items():
            if state.num_pending:
                state.blocks.append(np.concatenate(state.pending))
            if state.blocks:
                self._write_shard(split, state)
        return self._index.finish(num_duplicates=num_duplicates, inputs=inputs)

    def _cut(self, split: Split, state: _SplitState) -> None:
        """Make blocks of what is pending; each ends with the first token of the next, so that one must be there."""
        tokens = np.concatenate(state.pending)
        size = self.facts.block_tokens
        start = 0
        while len(tokens) - start > size:
            state.blocks.append(tokens[start : start + size + 1])
            start += size
            if len(state.blocks) == self.facts.shard_blocks:
                self._write_shard(split, state)
        state.pending = [tokens[start:]]
        state.num_pending = len(tokens) - start

    def _write_shard(self, split: Split, state: _SplitState) -> None:
        num_tokens = sum(min(len(block), self.facts.block_tokens) for block in state.blocks)
        first, after = state.first_token_of_shard, state.first_token_of_shard + num_tokens
        table = pa.Table.from_pylist(
            [row for row in state.documents if _overlaps(row, first, after)], schema=DOCUMENTS_SCHEMA
        )
        path = f"{split}/shards/{state.num_shards:0{SHARD_DIGITS}d}.arrow"
        self._index.add(split, write_shard(self._store, path, state.blocks, table, self.facts))
        state.blocks = []
        state.documents = [row for row in state.documents if _overlaps(row, after, state.num_tokens + 1)]
        state.first_token_of_shard = after
        state.num_shards += 1


def write_shard(
    store: Store, path: str, blocks: Sequence[Tokens], documents: pa.Table, facts: DatasetFacts
) -> ShardEntry:
    """Write a shard and the table of its documents.

    Args:
        store: the dataset's.
        path: of the shard.
        blocks: its blocks, each but a split's last with the first token of the next.
        documents: those that it holds something of, as in `DOCUMENTS_SCHEMA`.
        facts: what the dataset is.

    Raises:
        DataError: it cannot be written.
    """
    content, starts = token_shard_bytes(blocks, facts.dtype)
    table = table_bytes(documents)
    store.write(path, content)
    store.write(documents_name(path), table)
    num_tokens = sum(min(len(block), facts.block_tokens) for block in blocks)
    number = int(PurePosixPath(path).name[:SHARD_DIGITS])
    first = number * facts.block_tokens * facts.shard_blocks
    begins = documents.column("first_token").to_numpy()
    return ShardEntry(
        path=path,
        num_documents=int(((begins >= first) & (begins < first + num_tokens)).sum()),
        num_tokens=num_tokens,
        num_bytes=len(content),
        documents_sha256=hashlib.sha256(table).digest(),
        storage_class="STANDARD",
        block_starts=starts,
        block_hashes=block_hashes(content, starts),
    )


def entry_to_json(entry: ShardEntry) -> dict[str, object]:
    """A shard's entry as values of JSON."""
    hashes = [digest.hex() for digest in entry.block_hashes]
    return asdict(entry) | {"block_hashes": hashes, "documents_sha256": entry.documents_sha256.hex()}


def entry_from_json(text: str) -> ShardEntry:
    """The inverse of `entry_to_json`."""
    record = json.loads(text)
    record["documents_sha256"] = bytes.fromhex(record["documents_sha256"])
    record["block_starts"] = tuple(record["block_starts"])
    record["block_hashes"] = tuple(bytes.fromhex(digest) for digest in record["block_hashes"])
    return ShardEntry(**record)


def token_shard_bytes(blocks: Sequence[Tokens], dtype: npt.DTypeLike) -> tuple[bytes, tuple[int, ...]]:
    """A shard of these blocks of tokens; returns as `shard_bytes`."""
    schema = pa.schema([pa.field("tokens", pa.from_numpy_dtype(dtype), nullable=False)])
    return shard_bytes(
        [pa.record_batch([pa.array(block, schema.field(0).type)], schema=schema) for block in blocks], schema
    )


def shard_bytes(blocks: Sequence[pa.RecordBatch], schema: pa.Schema) -> tuple[bytes, tuple[int, ...]]:
    """A shard of these blocks, and the byte at which each block starts, with the end of the last."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as file:
        for block in blocks:
            file.write_batch(block)
    content: bytes = sink.getvalue().to_pybytes()
    reader = pa.BufferReader(content)
    reader.seek(MAGIC_BYTES)
    pa.ipc.read_message(reader)
    starts = [reader.tell()]
    for _ in blocks:
        pa.ipc.read_message(reader)
        starts.append(reader.tell())
    return content, tuple(starts)


def block_hashes(content: bytes, starts: Sequence[int]) -> tuple[bytes, ...]:
    """Hash of each block of a shard."""
    view = memoryview(content)
    return tuple(xxhash.xxh3_128_digest(view[start:end]) for start, end in itertools.pairwise(starts))


def _overlaps(row: dict[str, object], first: int, after: int) -> bool:
    start, count = row["first_token"], row["num_tokens"]
    assert isinstance(start, int) and isinstance(count, int)
    return start < after and start + count > first


def totals_of(rows: Sequence[dict[str, object]]) -> Totals:
    """What the rows of a root add up to."""
    return Totals(**{name: _sum(rows, name) for name in Totals.__dataclass_fields__})


def _sum(rows: Sequence[dict[str, object]], name: str) -> int:
    values = [row[name] for row in rows]
    return sum(value for value in values if isinstance(value, int))
