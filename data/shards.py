"""Reading a prepared dataset: tokens by position, documents by number; every block held against its hash."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from conf.errors import DataError
from conf.schema import StorageConfig
from data.archive import Archive
from data.blocks import BlockReader, intact
from data.cache import NUM_READERS, BlockCache, Tokens
from data.index import (
    MANIFEST_NAME,
    SPLITS,
    BlockRef,
    Manifest,
    Part,
    Root,
    Split,
    documents_name,
    identity_of,
    part_name,
    root_name,
)
from data.storage import MissingObjectError, Store
from data.stored import check_stored
from data.tables import numbers, read_table
from data.tier import Tier

CACHE_BYTES = 64 << 20
KEPT_SHARDS = 24 * 1024
"""Shards whose parts of the index are kept in memory; more than a shuffle draws from at a time."""


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
class DocumentPlace:
    """Where a document of a split is.

    Attributes:
        number: its place in the split.
        id: its name in the input.
        first_token: of it in the split.
        num_tokens: of it, the last one end-of-text.
    """

    number: int
    id: str
    first_token: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """How a dataset is read.

    Attributes:
        storage: how its storage is spoken to.
        tiers: caches on the way, fastest first.
        cache_bytes: decoded blocks kept in memory.
        archive: asked for archived shards, which are then waited for; None: reading one is an error.
    """

    storage: StorageConfig | None = None
    tiers: Sequence[Tier] = ()
    cache_bytes: int = CACHE_BYTES
    archive: Archive | None = None


class Dataset:
    """A prepared dataset, open for reading by several threads.

    Attributes:
        manifest: what `dataset.json` says.
        store: where it is.
        reader: its blocks, with what each tier did.
        archive: where its archived shards are asked for, if anywhere.
    """

    def __init__(self, store: Store, manifest: Manifest, roots: dict[Split, Root], access: Access) -> None:
        self.manifest = manifest
        self.store = store
        self.reader = BlockReader(store, access.tiers, access.archive.ask if access.archive else None)
        self.archive = access.archive
        self._roots = roots
        self._num_parts = max(1, KEPT_SHARDS // max(root.part_shards for root in roots.values()))
        self._parts: OrderedDict[tuple[Split, int], Future[Part]] = OrderedDict()
        self._lock = threading.Lock()
        self._blocks = BlockCache(
            manifest, self.reader, self._place_of, archive=access.archive, num_bytes=access.cache_bytes
        )

    @classmethod
    def open(cls, location: str | Path, access: Access | None = None) -> Dataset:
        """Open a dataset; reads its manifest and the roots of its index, whatever its size.

        Args:
            location: folder or URI.
            access: how to read it.

        Raises:
            DataError: there is no dataset, or it is damaged; names the file.
        """
        access = access or Access()
        store = Store.open(location, access.storage)
        names = (MANIFEST_NAME, *(root_name(split) for split in SPLITS))

        def read() -> list[memoryview]:
            with ThreadPoolExecutor(len(names)) as pool:
                return list(pool.map(store.read, names))

        def opened(contents: list[memoryview]) -> Dataset:
            manifest = Manifest.from_json(bytes(contents[0]), store.name_of(MANIFEST_NAME))
            roots = {
                split: Root(content, manifest, split, store.name_of(root_name(split)))
                for split, content in zip(SPLITS, contents[1:], strict=True)
            }
            if identity_of(manifest, contents[1:]) != manifest.identity:
                raise DataError(
                    f"{store.name_of(root_name('train'))}: does not belong to the {MANIFEST_NAME} beside it (identity "
                    f"{manifest.identity[:12]}...). One of the two was changed or copied from elsewhere: copy the "
                    "dataset again or prepare it anew."
                )
            return cls(store, manifest, roots, access)

        try:
            return intact(read, opened)
        except MissingObjectError:
            if store.exists(MANIFEST_NAME):
                raise
            raise DataError(
                f"{location}: no dataset here (there is no {MANIFEST_NAME}; it is written last). "
                "Make one with python -m data.prepare."
            ) from None

    def __repr__(self) -> str:
        return f"Dataset({self.path}, {self.num_tokens('train')} training tokens)"

    @property
    def path(self) -> str:
        """The absolute folder or the URI it can be opened at again, from anywhere."""
        return self.store.location

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

    @property
    def block_bytes(self) -> int:
        """Memory of a decoded block."""
        return self._blocks.block_bytes

    @property
    def waits_for(self) -> str | None:
        """Full name of the archived shard that a reader waits for at the moment."""
        return self._blocks.waits_for

    def num_tokens(self, split: Split) -> int:
        """Tokens of a split."""
        return self._roots[split].totals.num_tokens

    def num_documents(self, split: Split) -> int:
        """Documents of a split."""
        return self._roots[split].totals.num_documents

    def num_shards(self, split: Split) -> int:
        """Shards of a split."""
        return self._roots[split].totals.num_shards

    def keep(self, num_bytes: int) -> None:
        """Let decoded blocks take at least so much memory."""
        self._blocks.keep(num_bytes)

    def block(self, split: Split, number: int) -> Tokens:
        """A decoded block; see `BlockCache.block`."""
        return self._blocks.block(split, number)

    def expect(self, split: Split, numbers: Iterable[int]) -> None:
        """Begin to read blocks that will be asked for; see `BlockCache.expect`."""
        self._blocks.expect(split, numbers)

    def fetch(self, split: Split, numbers: Sequence[int]) -> None:
        """Read blocks now; see `BlockCache.fetch`."""
        self._blocks.fetch(split, numbers)

    def tokens(self, split: Split, start: int, count: int) -> Tokens:
        """Tokens [start, start + count) of a split's documents one after another.

        Returns:
            View of a decoded block where they lie in one, else a copy; uint16 or uint32, shape (count,).

        Raises:
            DataError: a shard is missing or damaged.
            IndexError: the range is outside the split.
        """
        if start < 0 or count < 1 or start + count > self.num_tokens(split):
            raise IndexError(f"tokens [{start}, {start + count}) of {self.num_tokens(split)} in {split}")
        size = self.manifest.block_tokens
        first = start // size
        # The last token may be the one that a block repeats of the next.
        last = max(first, (start + count - 2) // size)
        if last > first:
            self.expect(split, range(first, last + 1))
        parts = []
        for number in range(first, last + 1):
            low = max(start - number * size, 0)
            high = start + count - number * size if number == last else size
            parts.append(self.block(split, number)[low:high])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def document(self, split: Split, number: int) -> TokenDocument:
        """A document of a split.

        Raises:
            DataError: a shard is missing or damaged.
            IndexError: there is no such document.
        """
        (place,) = self.places(split, [number])
        return TokenDocument(number, place.id, self.tokens(split, place.first_token, place.num_tokens))

    def places(self, split: Split, documents: Sequence[int]) -> list[DocumentPlace]:
        """Where documents are, by their numbers and in the order of these; the table of each shard is read once.

        Raises:
            DataError: a table is missing or damaged.
            IndexError: there is no such document.
        """
        wanted = np.asarray(documents, np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < self.num_documents(split):
            raise IndexError(f"documents {wanted.min()} to {wanted.max()} of {self.num_documents(split)} in {split}")
        by_shard: dict[int, list[int]] = {}
        first_of_parts = self._roots[split].first_document
        for number in wanted.tolist():
            part_number = int(np.searchsorted(first_of_parts, number, side="right")) - 1
            inside = number - int(first_of_parts[part_number])
            shard = int(np.searchsorted(self.part(split, part_number).first_document, inside, side="right")) - 1
            by_shard.setdefault(part_number * self.part_shards(split) + shard, []).append(number)

        def found(shard: int) -> dict[int, DocumentPlace]:
            table = self.documents(split, shard)
            ids, firsts, counts = (table.column(name) for name in ("id", "first_token", "num_tokens"))
            # Numbers follow one another.
            rows = [(number, number - table.column("number")[0].as_py()) for number in by_shard[shard]]
            return {
                number: DocumentPlace(number, ids[row].as_py(), firsts[row].as_py(), counts[row].as_py())
                for number, row in rows
            }

        with ThreadPoolExecutor(NUM_READERS) as pool:
            places = {number: place for part in pool.map(found, by_shard) for number, place in part.items()}
        return [places[number] for number in wanted.tolist()]

    def document_ids(self, split: Split, start: int, count: int) -> list[str]:
        """Names of the documents that tokens [start, start + count) are of, in order.

        Raises:
            DataError: a shard is missing or damaged.
            IndexError: the range is outside the split.
        """
        return list(self._documents_at(split, start, count).values())

    def document_numbers(self, split: Split, start: int, count: int) -> list[int]:
        """Numbers of the documents that tokens [start, start + count) are of, in order; raises as `document_ids`."""
        return list(self._documents_at(split, start, count))

    def _documents_at(self, split: Split, start: int, count: int) -> dict[int, str]:
        if start < 0 or count < 1 or start + count > self.num_tokens(split):
            raise IndexError(f"tokens [{start}, {start + count}) of {self.num_tokens(split)} in {split}")
        size = self.manifest.block_tokens * self.manifest.shard_blocks
        ids: dict[int, str] = {}
        for shard in range(start // size, (start + count - 1) // size + 1):
            table = self.documents(split, shard)
            firsts, counts = numbers(table.column("first_token")), numbers(table.column("num_tokens"))
            rows = np.flatnonzero((firsts < start + count) & (firsts + counts > start))
            for row in rows.tolist():
                ids[table.column("number")[row].as_py()] = table.column("id")[row].as_py()
        return {number: ids[number] for number in sorted(ids)}

    def documents(self, split: Split, shard: int) -> pa.Table:
        """The documents that a shard holds something of: id, source, number, first_token, num_tokens.

        Raises:
            DataError: the table is missing or damaged.
        """
        part, inside = self.part_of(split, shard)
        entry = part.entry(inside)
        name = documents_name(entry.path)

        def table(content: memoryview) -> pa.Table:
            if hashlib.sha256(content).digest() != entry.documents_sha256:
                raise DataError(f"{self.store.name_of(name)}: another sha256 than the index says. Copy it again.")
            return read_table(content)

        return self.reader.parsed(name, entry.documents_sha256.hex(), table)

    def part_shards(self, split: Split) -> int:
        """Shards of a part of a split's index, but for the last, which may have fewer."""
        return self._roots[split].part_shards

    def part_of(self, split: Split, shard: int) -> tuple[Part, int]:
        """The part of the index that a shard is in, and its number there; raises as `part`."""
        number, inside = divmod(shard, self.part_shards(split))
        return self.part(split, number), inside

    def part(self, split: Split, number: int) -> Part:
        """A part of the index.

        Raises:
            DataError: it is missing or damaged.
        """
        key = (split, number)
        with self._lock:
            future = self._parts.get(key)
            is_new = future is None
            if future is None:
                future = self._parts[key] = Future()
                if len(self._parts) > self._num_parts:
                    self._parts.popitem(last=False)
            else:
                self._parts.move_to_end(key)
        if is_new:
            # By the first who asks; at the start all readers do.
            try:
                future.set_result(self._read_part(split, number))
            except BaseException as error:  # handed to whoever waits, whatever it is
                with self._lock:
                    self._parts.pop(key, None)
                future.set_exception(error)
        return future.result()

    def check_stored(self) -> None:
        """Hold the shards against what is stored; see `stored.check_stored`.

        Raises:
            DataError: a shard is missing, has another size or another type of tokens.
        """
        check_stored(self, pa.schema([pa.field("tokens", self.manifest.token_type, nullable=False)]))

    def give_up(self) -> None:
        """Let whoever waits for an archived shard fail now; later reads wait again."""
        self._blocks.give_up()

    def close(self) -> None:
        """End the threads that read."""
        self._blocks.close()

    def _read_part(self, split: Split, number: int) -> Part:
        root, name = self._roots[split], part_name(split, number)
        full_name = self.store.name_of(name)
        return self.reader.parsed(
            name, root.sha256(number).hex(), lambda content: Part(content, root, split, number, full_name)
        )

    def _place_of(self, split: Split, number: int) -> BlockRef:
        shard, block = divmod(number, self.manifest.shard_blocks)
        part, inside = self.part_of(split, shard)
        return part.block(inside, block)
