"""Blocks by their references: from the fastest tier that has them, else from storage; each held against its hash."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TypeVar

import xxhash

from conf.errors import DataError
from data.index import BlockRef
from data.storage import ArchivedObjectError, Store
from data.tier import Tier

REREADS = 4
"""What arrives damaged is read this often before it is called damaged where it is stored."""

T = TypeVar("T")
R = TypeVar("R")

OnArchived = Callable[[str], None]
"""Told the name of an archived shard that was met; returns at once."""


class BlockReader:
    """Reads blocks of one dataset through tiers.

    Attributes:
        tiers: fastest first; each gets what comes from behind it.
        num_damaged: blocks that arrived damaged from storage and were read again.
    """

    def __init__(self, store: Store, tiers: Sequence[Tier] = (), on_archived: OnArchived | None = None) -> None:
        self.tiers = list(tiers)
        self.num_damaged = 0
        self._store = store
        self._on_archived = on_archived

    def name_of(self, path: str) -> str:
        """Full name of a shard, for messages."""
        return self._store.name_of(path)

    def read(self, blocks: Sequence[BlockRef], lease: str) -> list[memoryview]:
        """The bytes of blocks, those that lie one after another in a shard by one request.

        Args:
            blocks: in the order they are stored in.
            lease: what tiers shared by processes know these blocks by while they are fetched; the same for all who may
                fetch one of them at the same time.

        Raises:
            ArchivedObjectError: a shard must be restored first.
            DataError: one cannot be read, or is damaged where it is stored; names the shard.
        """
        found = self._found(self.tiers, blocks)
        if missing := [block for block in blocks if block not in found]:
            with self._lease(lease):
                # Whoever held the lease before may have fetched them.
                found |= self._found([tier for tier in self.tiers if tier.name == "disk"], missing, count=False)
                for run in _runs([block for block in missing if block not in found]):
                    for block, content in zip(run, self._from_storage(run), strict=True):
                        found[block] = content
                        for tier in self.tiers:
                            tier.put(block.digest.hex(), content)
        return [found[block] for block in blocks]

    def parsed(self, name: str, key: str, parse: Callable[[memoryview], T]) -> T:
        """What `parse` makes of a whole object, read from a tier that processes share where one has it.

        Args:
            name: of the object.
            key: hash of its content, which `parse` holds it against.
            parse: raises `DataError` for what is damaged.

        Raises:
            DataError: it cannot be read, or is damaged where it is stored.
        """
        shared = [tier for tier in self.tiers if tier.name != "memory"]

        def found(tiers: Sequence[Tier]) -> T | None:
            for place, tier in enumerate(tiers):
                content = tier.get(key)
                if content is not None:
                    try:
                        result = parse(content)
                    except DataError:
                        tier.drop(key)
                        continue
                    for faster in tiers[:place]:
                        faster.put(key, content)
                    return result
            return None

        def kept(content: memoryview) -> T:
            result = parse(content)
            for tier in shared:
                tier.put(key, content)
            return result

        result = found(shared)
        if result is None:
            with self._lease(key):
                # Whoever held the lease before may have read it.
                result = found([tier for tier in shared if tier.name == "disk"])
                if result is None:
                    result = intact(lambda: self._store.read(name), kept)
        return result

    def _lease(self, key: str) -> AbstractContextManager[object]:
        return next((tier.lease(key) for tier in self.tiers if tier.name == "disk"), nullcontext())

    def _found(
        self, tiers: Sequence[Tier], blocks: Sequence[BlockRef], *, count: bool = True
    ) -> dict[BlockRef, memoryview]:
        """Those of the blocks that tiers have."""
        contents = {block: self._from_tiers(tiers, block, count=count) for block in blocks}
        return {block: content for block, content in contents.items() if content is not None}

    def _from_tiers(self, tiers: Sequence[Tier], block: BlockRef, *, count: bool) -> memoryview | None:
        key = block.digest.hex()
        for place, tier in enumerate(tiers):
            started = time.perf_counter()
            content = tier.get(key)
            damaged = content is not None and not _is_intact(content, block)
            if damaged:
                tier.drop(key)
                content = None
            with tier.counters.lock:
                tier.counters.damaged += damaged
                tier.counters.seconds += time.perf_counter() - started
                if content is not None:
                    tier.counters.hits += 1
                    tier.counters.bytes_read += len(content)
                else:
                    tier.counters.misses += count
            if content is not None:
                for faster in tiers[:place]:
                    faster.put(key, content)
                return content
        return None

    def _from_storage(self, run: Sequence[BlockRef]) -> list[memoryview]:
        """Blocks that lie one after another."""
        first = run[0].start
        content = self._asked(run[0].path, first, run[-1].start + run[-1].num_bytes - first)
        parts = [content[block.start - first :][: block.num_bytes] for block in run]
        return [self._intact(part, block) for part, block in zip(parts, run, strict=True)]

    def _intact(self, content: memoryview, block: BlockRef) -> memoryview:
        for attempt in range(REREADS):
            if attempt:
                content = self._asked(block.path, block.start, block.num_bytes)
            if _is_intact(content, block):
                return content
            self.num_damaged += 1
        raise DataError(
            f"{self._store.name_of(block.path)}: corrupt shard (bytes {block.start} to "
            f"{block.start + block.num_bytes} have another hash than the index says, {REREADS} times). "
            "Copy it again, or delete and prepare the dataset."
        )

    def _asked(self, path: str, start: int, num_bytes: int) -> memoryview:
        try:
            return self._store.read(path, start, num_bytes)
        except ArchivedObjectError:
            if self._on_archived is not None:
                self._on_archived(path)
            raise


def intact(read: Callable[[], R], parse: Callable[[R], T]) -> T:
    """What `parse` makes of what is read; what it refuses is read again, for it may have been damaged on the way.

    Raises:
        DataError: that of the last attempt, or of reading.
    """
    for _ in range(REREADS - 1):
        content = read()
        with suppress(DataError):
            return parse(content)
    return parse(read())


def _runs(blocks: Sequence[BlockRef]) -> list[list[BlockRef]]:
    """Blocks, with those together that lie one after another in a shard."""
    runs: list[list[BlockRef]] = []
    for block in blocks:
        last = runs[-1][-1] if runs else None
        if last is not None and last.path == block.path and last.start + last.num_bytes == block.start:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _is_intact(content: memoryview, block: BlockRef) -> bool:
    return len(content) == block.num_bytes and xxhash.xxh3_128_digest(content) == block.digest
