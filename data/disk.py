"""A cache of blocks on a local disk, shared by the processes of a node."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from conf.errors import DataError
from conf.schema import DiskTierConfig
from data.rooms import Rooms
from data.tier import PAUSE_SECONDS, TierCounters

KEEP_FRACTION = 0.9
"""A full disk tier is emptied down to this."""
STALE_SECONDS = 600.0


class DiskTier:
    """A folder of files on a local disk, shared by the ranks of a node.

    A file appears by rename, so nobody reads half of one; removing one that is being read does not disturb the reader.
    Nothing is synced: what a crash leaves of a file is found by its hash. Leases are locks on bytes of one file, which
    the kernel gives back when their holder dies, and files are in 16 folders: to make files and folders costs as much
    as to write blocks. The bytes in use are a number in a file, changed under a lock, counted anew when the tier is
    emptied.
    """

    def __init__(self, config: DiskTierConfig) -> None:
        """Make the folder.

        Raises:
            DataError: it cannot be made or written to.
        """
        self.name = "disk"
        self.counters = TierCounters()
        self._limit = config.num_bytes
        self._root = Path(config.path).expanduser()
        self._rooms: dict[int, Rooms] = {}
        self._paused_until = 0.0
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            (self._root / "locks").touch()
            (self._root / "usage").touch()
        except OSError as error:
            raise DataError(
                f"{self._root}: cannot be a disk tier ({error.strerror}). Name a folder on a local disk that you may "
                "write to in data.tiers."
            ) from error

    def get(self, key: str) -> memoryview | None:
        """See `Tier`."""
        try:
            descriptor = os.open(self._path(key), os.O_RDONLY)
            try:
                room = self._room(os.fstat(descriptor).st_size)
                # Not mapped: what a failing disk does to a reader of mapped memory is kill it.
                num_bytes = os.readv(descriptor, [room])
                os.utime(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            self._failed(error)
            return None
        return room[:num_bytes]

    def put(self, key: str, content: memoryview) -> None:
        """See `Tier`."""
        if len(content) > self._limit or time.monotonic() < self._paused_until:
            return
        path = self._path(key)
        partial = f"{self._root}/{key[0]}/.{key}.{os.urandom(4).hex()}"
        try:
            if os.path.exists(path):
                return
            try:
                self._write(partial, content)
                # It appears under the lock: room is made by counting files, and must not miss one on its way.
                with self._usage(len(content)) as used:
                    if used + len(content) > self._limit:
                        self._make_room(len(content))
                    os.rename(partial, path)
            except BaseException:
                Path(partial).unlink(missing_ok=True)
                raise
        except OSError as error:
            self._failed(error)

    def drop(self, key: str) -> None:
        """See `Tier`."""
        Path(self._path(key)).unlink(missing_ok=True)

    @contextmanager
    def lease(self, key: str) -> Iterator[object]:
        """Wait until nobody else on the node fetches this block."""
        try:
            descriptor = os.open(f"{self._root}/locks", os.O_RDWR)
        except OSError as error:
            self._failed(error)
            yield None
            return
        try:
            # Of the open file, not of the process, whose threads would all hold it. A byte far behind the end will do.
            lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, int(key[:15], 16), 1, 0)
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW, lock)
            yield None
        finally:
            os.close(descriptor)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key[0]}/{key}"

    def _room(self, num_bytes: int) -> memoryview:
        """Memory for a file."""
        size = 1 << max(num_bytes - 1, 0).bit_length()
        return self._rooms.setdefault(size, Rooms(size)).array(num_bytes, np.uint8).data

    def _write(self, path: str, content: memoryview) -> None:
        """Make a file; its folder may be new."""
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        try:
            descriptor = os.open(path, flags, 0o666)
        except FileNotFoundError:
            with suppress(FileExistsError):
                os.mkdir(os.path.dirname(path))
            descriptor = os.open(path, flags, 0o666)
        try:
            if os.write(descriptor, content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)

    def _failed(self, error: OSError) -> None:
        """A missing file is a miss; a disk that is full or broken is left alone for a while."""
        if not isinstance(error, FileNotFoundError):
            self.counters.failures += 1
            self._paused_until = time.monotonic() + PAUSE_SECONDS

    @contextmanager
    def _usage(self, added: int) -> Iterator[int]:
        """Bytes in use by all processes; `added` is counted in when the block is left."""
        descriptor = os.open(f"{self._root}/usage", os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            used = _number(os.pread(descriptor, 8, 0))
            yield used
            os.pwrite(descriptor, struct.pack("<q", _number(os.pread(descriptor, 8, 0)) + added), 0)
        finally:
            os.close(descriptor)

    def _make_room(self, wanted: int) -> None:
        """Remove what was used longest ago, and what killed processes left; called under the lock of `usage`."""
        files: list[tuple[float, int, Path]] = []
        for folder in self._root.glob("[0-9a-f]"):
            for entry in os.scandir(folder):
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue
                if not entry.name.startswith("."):
                    files.append((status.st_mtime, status.st_size, Path(entry.path)))
                elif time.time() - status.st_mtime > STALE_SECONDS:
                    Path(entry.path).unlink(missing_ok=True)
        used = sum(size for _, size, _ in files)
        goal = min(self._limit * KEEP_FRACTION, self._limit - wanted)
        for _, size, path in sorted(files):
            if used <= goal:
                break
            path.unlink(missing_ok=True)
            used -= size
        (self._root / "usage").write_bytes(struct.pack("<q", used))


def _number(content: bytes) -> int:
    return int(struct.unpack("<q", content)[0]) if len(content) == 8 else 0
