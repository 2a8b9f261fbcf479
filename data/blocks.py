"""A block by its reference: from the fastest tier that has it, else from storage; checked against its hash always."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import xxhash

from conf.errors import DataError
from data.index import BlockRef
from data.storage import ArchivedObjectError, Store
from data.tiers import Tier

REREADS = 4
"""A block that arrives damaged is read again this often before its shard is called corrupt."""

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

    def read(self, block: BlockRef) -> memoryview:
        """The bytes of a block.

        Raises:
            ArchivedObjectError: its shard must be restored first.
            DataError: it cannot be read, or is damaged where it is stored; names the shard.
        """
        key = block.digest.hex()
        content = self._from_tiers(self.tiers, block, key)
        if content is not None:
            return content
        with self._lease(key):
            # Whoever held the lease before may have fetched it.
            shared = [tier for tier in self.tiers if tier.name == "disk"]
            content = self._from_tiers(shared, block, key, count=False) or self._from_storage(block)
            for tier in self.tiers:
                tier.put(key, content)
        return content

    def _lease(self, key: str) -> AbstractContextManager[object]:
        return next((tier.lease(key) for tier in self.tiers if tier.name == "disk"), nullcontext())

    def _from_tiers(self, tiers: Sequence[Tier], block: BlockRef, key: str, *, count: bool = True) -> memoryview | None:
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

    def _from_storage(self, block: BlockRef) -> memoryview:
        for _ in range(REREADS):
            try:
                content = self._store.read(block.path, block.start, block.num_bytes)
            except ArchivedObjectError:
                if self._on_archived is not None:
                    self._on_archived(block.path)
                raise
            if _is_intact(content, block):
                return content
            self.num_damaged += 1
        raise DataError(
            f"{self._store.name_of(block.path)}: corrupt shard (bytes {block.start} to "
            f"{block.start + block.num_bytes} have another hash than the index says, {REREADS} times). "
            "Copy it again, or delete and prepare the dataset."
        )


def _is_intact(content: memoryview, block: BlockRef) -> bool:
    return len(content) == block.num_bytes and xxhash.xxh3_128_digest(content) == block.digest
