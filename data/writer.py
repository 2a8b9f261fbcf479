"""Writing a dataset: documents of tokens come in, blocks, shards, index and manifest go out."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

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


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetFacts:
    """What a manifest says besides sums; see `Manifest`."""

    tokenizer_sha256: str
    vocab_size: int
    end_of_text_id: int
    held_out_fraction: float
    block_tokens: int = BLOCK_TOKENS
    shard_blocks: int = SHARD_BLOCKS


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
    entries: list[ShardEntry] = field(default_factory=list)
    part_rows: list[dict[str, object]] = field(default_factory=list)


class DatasetWriter:
    """Writes one dataset into a store; holds one shard of each split in memory.

    Attributes:
        facts: what the dataset is.
    """

    def __init__(self, store: Store, facts: DatasetFacts) -> None:
        self.facts = facts
        self._store = store
        self._dtype = np.uint16 if facts.vocab_size <= 1 << 16 else np.uint32
        self._states: dict[Split, _SplitState] = {split: _SplitState() for split in SPLITS}

    def num_documents(self, split: Split) -> int:
        """Documents of a split so far."""
        return self._states[split].num_documents

    def add(self, split: Split, document_id: str, source: str, tokens: npt.NDArray[np.integer]) -> None:
        """Append a document; its end-of-text token is added here.

        Raises:
            ValueError: a token is negative or not below the vocabulary's size.
            DataError: a shard cannot be written.
        """
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.facts.vocab_size:
            raise ValueError(f"document {document_id}: tokens from {tokens.min()} to {tokens.max()}, must be in "
                             f"[0, {self.facts.vocab_size})")  # fmt: skip
        state = self._states[split]
        values: Tokens = np.full(len(tokens) + 1, self.facts.end_of_text_id, self._dtype)
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
        roots = []
        totals: dict[Split, Totals] = {}
        for split, state in self._states.items():
            if state.num_pending:
                state.blocks.append(np.concatenate(state.pending))
            if state.blocks:
                self._write_shard(split, state)
            if state.entries:
                self._write_part(split, state)
            roots.append(root_bytes(state.part_rows))
            self._store.write(root_name(split), roots[-1])
            totals[split] = Totals(**{name: _sum(state.part_rows, name) for name in Totals.__dataclass_fields__})
        facts = self.facts
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
        path = f"{split}/shards/{state.num_shards:08d}.arrow"
        content, starts = token_shard_bytes(state.blocks, self._dtype)
        num_tokens = sum(min(len(block), self.facts.block_tokens) for block in state.blocks)
        first, after = state.first_token_of_shard, state.first_token_of_shard + num_tokens
        table = pa.Table.from_pylist(
            [row for row in state.documents if _overlaps(row, first, after)], schema=DOCUMENTS_SCHEMA
        )
        documents = table_bytes(table)
        self._store.write(path, content)
        self._store.write(documents_name(path), documents)
        state.entries.append(
            ShardEntry(
                path=path,
                num_documents=sum(first <= int(start) < after for start in table.column("first_token").to_pylist()),
                num_tokens=num_tokens,
                num_bytes=len(content),
                documents_sha256=hashlib.sha256(documents).digest(),
                storage_class="STANDARD",
                block_starts=starts,
                block_hashes=block_hashes(content, starts),
            )
        )
        state.blocks = []
        state.documents = [row for row in state.documents if _overlaps(row, after, state.num_tokens + 1)]
        state.first_token_of_shard = after
        state.num_shards += 1
        if len(state.entries) == PART_SHARDS:
            self._write_part(split, state)

    def _write_part(self, split: Split, state: _SplitState) -> None:
        content = part_bytes(state.entries)
        self._store.write(part_name(split, len(state.part_rows)), content)
        state.part_rows.append(part_row(state.entries, content))
        state.entries = []


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


def _sum(rows: Sequence[dict[str, object]], name: str) -> int:
    values = [row[name] for row in rows]
    return sum(value for value in values if isinstance(value, int))
