"""Reading a prepared dataset: tokens by position, documents by number, every shard held against its hash."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from conf.errors import DataError
from data.index import INDEX_NAME, MANIFEST_NAME, SPLITS, Manifest, ShardEntry, Split, SplitIndex, read_index
from data.storage import Storage

CACHE_BYTES = 256 << 20

Tokens = npt.NDArray[np.uint16 | np.uint32]


@dataclass(frozen=True, slots=True)
class TokenDocument:
    """A document of a split.

    Attributes:
        number: its place in the split.
        id: its name in the input.
        tokens: its tokens, the last one end-of-text.
    """

    number: int
    id: str
    tokens: Tokens


@dataclass(frozen=True, slots=True)
class Shard:
    """A decoded shard.

    Attributes:
        tokens: of all documents, one after another; a read-only view of Arrow's memory.
        offsets: int32 position of each document's first token; one more entry, the total.
        ids: names of the documents.
    """

    tokens: Tokens
    offsets: npt.NDArray[np.int32]
    ids: pa.StringArray

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        return int(self.tokens.nbytes + self.offsets.nbytes + self.ids.nbytes)


class Dataset:
    """A prepared dataset, open for reading by several threads.

    Attributes:
        manifest: what `dataset.json` says.
    """

    def __init__(self, storage: Storage, manifest: Manifest, splits: dict[Split, SplitIndex], cache_bytes: int) -> None:
        self.manifest = manifest
        self._storage = storage
        self._splits = splits
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[str, Shard] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, location: str | Path, *, cache_bytes: int = CACHE_BYTES) -> Dataset:
        """Open a dataset; reads its manifest, its index and the names and sizes of its shards.

        Args:
            location: folder or URI.
            cache_bytes: decoded shards kept in memory; the one in use stays whatever its size.

        Raises:
            DataError: there is no dataset, or it is damaged; names the file.
        """
        storage = Storage.open(location)
        if not storage.exists(MANIFEST_NAME):
            raise DataError(
                f"{location}: no dataset here (there is no {MANIFEST_NAME}; it is written last). "
                "Make one with python -m data.prepare."
            )
        manifest = Manifest.from_json(storage.read(MANIFEST_NAME), storage.name_of(MANIFEST_NAME))
        splits = read_index(storage.read(INDEX_NAME), manifest, storage.name_of(INDEX_NAME))
        for split in SPLITS:
            _check_stored(storage, split, splits[split])
        return cls(storage, manifest, splits, cache_bytes)

    def __repr__(self) -> str:
        return f"Dataset({self.path}, {self.num_tokens('train')} training tokens)"

    @property
    def path(self) -> str:
        """The absolute folder or the URI it can be opened at again, from anywhere."""
        return self._storage.location

    @property
    def identity(self) -> str:
        """Hash of what it holds: datasets of one identity give the same tokens at every position."""
        return self.manifest.identity

    @property
    def tokenizer_sha256(self) -> str:
        """Hash of the tokenizer that made it."""
        return self.manifest.tokenizer_sha256

    @property
    def end_of_text_id(self) -> int:
        """The token that ends every document."""
        return self.manifest.end_of_text_id

    def num_tokens(self, split: Split) -> int:
        """Tokens of a split."""
        return int(self._splits[split].first_token[-1])

    def num_documents(self, split: Split) -> int:
        """Documents of a split."""
        return int(self._splits[split].first_document[-1])

    def tokens(self, split: Split, start: int, count: int) -> Tokens:
        """Tokens [start, start + count) of a split's documents one after another, across shards.

        Returns:
            Read-only view of a decoded shard where they lie in one, else a copy; uint16 or uint32, shape (count,).

        Raises:
            DataError: a shard is missing or damaged.
            IndexError: the range is outside the split.
        """
        self._check_range(split, start, count)
        parts = [shard.tokens[low:high] for shard, low, high in self._parts(split, start, count)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def document(self, split: Split, number: int) -> TokenDocument:
        """A document of a split.

        Raises:
            DataError: its shard is missing or damaged.
            IndexError: there is no such document.
        """
        index = self._splits[split]
        if not 0 <= number < self.num_documents(split):
            raise IndexError(f"document {number} of {self.num_documents(split)} in {split}")
        shard_number = int(np.searchsorted(index.first_document, number, side="right")) - 1
        shard = self._shard(index.entry(shard_number))
        row = number - int(index.first_document[shard_number])
        tokens = shard.tokens[shard.offsets[row] : shard.offsets[row + 1]]
        return TokenDocument(number, shard.ids[row].as_py(), tokens)

    def document_ids(self, split: Split, start: int, count: int) -> list[str]:
        """Names of the documents that tokens [start, start + count) are of, in order.

        Raises:
            DataError: a shard is missing or damaged.
            IndexError: the range is outside the split.
        """
        self._check_range(split, start, count)
        ids: list[str] = []
        for shard, low, high in self._parts(split, start, count):
            first = int(np.searchsorted(shard.offsets, low, side="right")) - 1
            last = int(np.searchsorted(shard.offsets, high, side="left"))
            ids += shard.ids[first:last].to_pylist()
        return ids

    def document_numbers(self, split: Split, start: int, count: int) -> range:
        """Numbers of the documents that tokens [start, start + count) are of.

        Raises:
            DataError: a shard is missing or damaged.
            IndexError: the range is outside the split.
        """
        self._check_range(split, start, count)
        first, last = (self._document_at(split, token) for token in (start, start + count - 1))
        return range(first, last + 1)

    def _document_at(self, split: Split, token: int) -> int:
        index = self._splits[split]
        number = int(np.searchsorted(index.first_token, token, side="right")) - 1
        offsets = self._shard(index.entry(number)).offsets
        row = int(np.searchsorted(offsets, token - int(index.first_token[number]), side="right")) - 1
        return int(index.first_document[number]) + row

    def _check_range(self, split: Split, start: int, count: int) -> None:
        if start < 0 or count < 1 or start + count > self.num_tokens(split):
            raise IndexError(f"tokens [{start}, {start + count}) of {self.num_tokens(split)} in {split}")

    def _parts(self, split: Split, start: int, count: int) -> list[tuple[Shard, int, int]]:
        """The shards a range lies in, each with the range inside it."""
        index = self._splits[split]
        parts = []
        end = start + count
        number = int(np.searchsorted(index.first_token, start, side="right")) - 1
        while start < end:
            first, after = int(index.first_token[number]), int(index.first_token[number + 1])
            parts.append((self._shard(index.entry(number)), start - first, min(end, after) - first))
            start = after
            number += 1
        return parts

    def _shard(self, entry: ShardEntry) -> Shard:
        with self._lock:
            shard = self._cache.pop(entry.path, None) or self._read(entry)
            self._cache[entry.path] = shard
            kept = sum(cached.num_bytes for cached in self._cache.values())
            while kept > self._cache_bytes and len(self._cache) > 1:
                kept -= self._cache.popitem(last=False)[1].num_bytes
        return shard

    def _read(self, entry: ShardEntry) -> Shard:
        name = self._storage.name_of(entry.path)
        content = self._storage.read(entry.path)
        sha256 = hashlib.sha256(content).hexdigest()
        if sha256 != entry.sha256:
            raise DataError(
                f"{name}: corrupt shard ({len(content)} bytes with sha256 {sha256[:12]}..., the index says "
                f"{entry.num_bytes} with {entry.sha256[:12]}...). Copy it again, or delete and prepare the dataset."
            )
        return _decoded(content, entry, self.manifest.vocab_size, name)


def _check_stored(storage: Storage, split: Split, index: SplitIndex) -> None:
    """Hold the names and sizes of a split's shards against what is stored, with one listing.

    Raises:
        DataError: a shard is missing or has another size.
    """
    sizes = storage.sizes(split)
    for number in range(len(index)):
        entry = index.entry(number)
        size = sizes.get(entry.path)
        if size is None:
            raise DataError(f"{storage.name_of(entry.path)}: missing shard. Copy it again or prepare the dataset anew.")
        if size != entry.num_bytes:
            raise DataError(
                f"{storage.name_of(entry.path)}: truncated or changed shard ({size} bytes, the index says "
                f"{entry.num_bytes}). Copy it again, or delete the dataset and prepare it anew."
            )


def _decoded(content: bytes, entry: ShardEntry, vocab_size: int, name: str) -> Shard:
    try:
        table = pq.read_table(pa.BufferReader(content), columns=["id", "tokens"]).combine_chunks()
        lists, ids = table.column("tokens").chunk(0), table.column("id").chunk(0)
        offsets = lists.offsets.to_numpy()
        tokens = lists.values.to_numpy(zero_copy_only=True)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise DataError(f"{name}: not a shard ({error}). Prepare the dataset anew.") from error
    if len(ids) != entry.num_documents or len(tokens) != entry.num_tokens or int(tokens.max()) >= vocab_size:
        raise DataError(
            f"{name}: {len(ids)} documents, {len(tokens)} tokens, the largest {tokens.max()}; the index says "
            f"{entry.num_documents} and {entry.num_tokens}, and tokens are below {vocab_size}. Prepare it anew."
        )
    return Shard(tokens, offsets, ids)
