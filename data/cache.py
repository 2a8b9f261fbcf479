"""Decoded blocks in memory: read and decoded by threads before they are needed, kept while there is room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from conf.errors import DataError
from data.archive import Archive
from data.blocks import BlockReader
from data.decoder import Decoder
from data.index import GROUP_BLOCKS, BlockRef, Manifest, Split
from data.storage import ArchivedObjectError

NUM_READERS = 8

Tokens = npt.NDArray[np.uint16 | np.uint32]


class _Kept(NamedTuple):
    """A block that is there or on its way.

    Attributes:
        tokens: the block.
        unread: those that are to be read together with it, itself included, by number; empty when somebody reads them.
    """

    tokens: Future[Tokens]
    unread: dict[int, Future[Tokens]]


class BlockCache:
    """The decoded blocks of a dataset; for use by several threads.

    Attributes:
        block_bytes: memory of a block.
        waits_for: full name of the archived shard that somebody waits for at the moment.
    """

    def __init__(
        self,
        manifest: Manifest,
        reader: BlockReader,
        place_of: Callable[[Split, int], BlockRef],
        *,
        archive: Archive | None,
        num_bytes: int,
    ) -> None:
        """An empty cache.

        Args:
            manifest: of the dataset.
            reader: of stored blocks.
            place_of: where a block is, by its number in a split.
            archive: where archived shards are waited for; None: reading one is an error.
            num_bytes: that blocks may take; two are kept in any case.
        """
        token_type = np.dtype(f"u{manifest.token_type.bit_width // 8}")
        self.block_bytes = (manifest.block_tokens + 1) * token_type.itemsize
        self.waits_for: str | None = None
        self._manifest = manifest
        self._reader = reader
        self._place_of = place_of
        self._archive = archive
        self._num_bytes = num_bytes
        self._given_up = threading.Event()
        self._decoder = Decoder(manifest.block_tokens + 1, token_type)
        self._kept: OrderedDict[tuple[Split, int], _Kept] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="blocks")

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, num_bytes: int) -> None:
        """Let blocks take at least so much memory."""
        self._num_bytes = max(self._num_bytes, num_bytes)

    def block(self, split: Split, number: int) -> Tokens:
        """A block: its tokens and, but for the last of the split, the first token of the next; read-only.

        Raises:
            DataError: its shard is missing or damaged, or archived and given up.
        """
        key = (split, number)
        while True:
            with self._lock:
                self._begin(split, [number])
                kept = self._kept[key]
            # If no thread has come to it: sooner read here than waited for.
            self._read(split, kept.unread)
            try:
                return kept.tokens.result()
            except CancelledError:
                with self._lock:
                    if self._kept.get(key) is kept:
                        raise  # closed
                # Dropped for others before anybody read it.
            except BaseException as error:
                with self._lock:
                    self._kept.pop(key, None)
                if self._archive is None or not isinstance(error, ArchivedObjectError):
                    raise
                # Here and not in the pool: blocks that are not archived are read meanwhile.
                self._thaw(self._archive, self._place_of(split, number).path)

    def expect(self, split: Split, numbers: Iterable[int]) -> None:
        """Begin to read blocks that will be asked for; what was asked for longest ago is dropped for them.

        Args:
            split: they are of.
            numbers: ascending. Those of a group of `GROUP_BLOCKS` are read together.
        """
        with self._lock:
            self._begin(split, numbers)

    def fetch(self, split: Split, numbers: Sequence[int]) -> None:
        """Read blocks now: returns when each is there or has failed, which `block` will tell; does not wait for thaws.

        Args:
            split: they are of.
            numbers: as for `expect`.
        """
        with self._lock:
            self._begin(split, numbers)
            wanted = [self._kept[split, number] for number in numbers if (split, number) in self._kept]
        for kept in wanted:
            self._read(split, kept.unread)
        for kept in wanted:
            with suppress(CancelledError):
                kept.tokens.exception()

    def give_up(self) -> None:
        """Let whoever waits for an archived shard fail now; later reads wait again."""
        with self._lock:
            given_up, self._given_up = self._given_up, threading.Event()
        given_up.set()

    def close(self) -> None:
        """End the threads that read."""
        self.give_up()
        self._pool.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            for kept in self._kept.values():
                kept.tokens.cancel()

    def _begin(self, split: Split, numbers: Iterable[int]) -> None:
        """Begin to read blocks that are not there; called under the lock."""
        groups: dict[int, dict[int, Future[Tokens]]] = {}
        for number in numbers:
            if (split, number) in self._kept:
                self._kept.move_to_end((split, number))
                continue
            group = groups.setdefault(number // GROUP_BLOCKS, {})
            group[number] = Future()
            self._kept[split, number] = _Kept(group[number], group)
            if len(self._kept) > max(2, self._num_bytes // self.block_bytes):
                self._kept.popitem(last=False)[1].tokens.cancel()
        for group in groups.values():
            self._pool.submit(self._read, split, group)

    def _thaw(self, archive: Archive, path: str) -> None:
        with self._lock:
            given_up = self._given_up
        name = self.waits_for = self._reader.name_of(path)
        try:
            if not archive.wait(path, given_up):
                raise DataError(f"{name}: is archived, and was not waited for to the end because the run was stopped.")
        finally:
            self.waits_for = None

    def _read(self, split: Split, unread: dict[int, Future[Tokens]]) -> None:
        """Read blocks of a group that nobody reads yet, but those that were dropped meanwhile."""
        with self._lock:
            group = dict(unread)
            unread.clear()
        running = {number: tokens for number, tokens in group.items() if tokens.set_running_or_notify_cancel()}
        if running:
            self._fulfil(split, running)

    def _fulfil(self, split: Split, group: dict[int, Future[Tokens]]) -> None:
        try:
            lease = self._place_of(split, min(group) // GROUP_BLOCKS * GROUP_BLOCKS).digest.hex()
            refs = [self._place_of(split, number) for number in group]
            contents = self._reader.read(refs, lease)
        except BaseException as error:  # handed to whoever waits, whatever it is
            for number, tokens in group.items():
                if len(group) == 1:
                    tokens.set_exception(error)
                else:
                    # Alone, so that nobody gets the error of another block.
                    self._fulfil(split, {number: tokens})
            return
        for (number, tokens), ref, content in zip(group.items(), refs, contents, strict=True):
            try:
                tokens.set_result(self._decoded(split, number, ref, content))
            except DataError as error:
                tokens.set_exception(error)

    def _decoded(self, split: Split, number: int, ref: BlockRef, content: memoryview) -> Tokens:
        manifest = self._manifest
        left = manifest.splits[split].num_tokens - number * manifest.block_tokens
        try:
            tokens: Tokens = self._decoder.decode(content, min(left, manifest.block_tokens + 1))
            if int(tokens.max()) >= manifest.vocab_size:
                raise ValueError(f"token {tokens.max()}, and all are below {manifest.vocab_size}")
        except ValueError as error:
            name, block = self._reader.name_of(ref.path), number % manifest.shard_blocks
            raise DataError(f"{name}: not a shard (block {block}: {error}). Prepare the dataset anew.") from error
        return tokens
