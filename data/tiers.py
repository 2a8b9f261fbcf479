"""Caches between a reader and the storage it reads from: host memory, a local disk, Redis; fastest first.

A tier holds copies of blocks that a store can give again, under the hash of their content: what it returns can always
be checked, is never out of date, and may be dropped at any time. Losing a tier costs time, never samples.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from conf.errors import DataError
from conf.schema import DiskTierConfig, MemoryTierConfig, RedisTierConfig, TierConfig
from data.rooms import Rooms

KEEP_FRACTION = 0.9
"""A full disk tier is emptied down to this."""
STALE_SECONDS = 600.0
PAUSE_SECONDS = 5.0
"""A tier that failed is left alone for this long."""


@dataclass(slots=True)
class TierCounters:
    """What a tier did so far."""

    hits: int = 0
    misses: int = 0
    damaged: int = 0
    failures: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def hit_ratio(self) -> float:
        """Hits over look-ups; 0 before the first."""
        return self.hits / max(1, self.hits + self.misses)

    def as_dict(self) -> dict[str, float]:
        """For the record of a run."""
        return {
            "hits": self.hits,
            "hit_ratio": self.hit_ratio,
            "bytes": self.bytes_read,
            "seconds": self.seconds,
            "damaged": self.damaged,
            "failures": self.failures,
        }


class Tier(Protocol):
    """A bounded cache; any method may be called from several threads."""

    name: str
    counters: TierCounters

    def get(self, key: str) -> memoryview | None:
        """The content kept under a key, or None; never raises."""
        ...

    def put(self, key: str, content: memoryview) -> None:
        """Keep content, dropping what was used longest ago where room is needed; never raises."""
        ...

    def drop(self, key: str) -> None:
        """Forget a key."""
        ...

    def lease(self, key: str) -> AbstractContextManager[object]:
        """Held by whoever fetches a block for all processes that share the tier."""
        ...


class MemoryTier:
    """Host memory of this process."""

    def __init__(self, config: MemoryTierConfig) -> None:
        self.name = "memory"
        self.counters = TierCounters()
        self._limit = config.num_bytes
        self._kept: OrderedDict[str, memoryview] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: str) -> memoryview | None:
        """See `Tier`."""
        with self._lock:
            content = self._kept.get(key)
            if content is not None:
                self._kept.move_to_end(key)
            return content

    def put(self, key: str, content: memoryview) -> None:
        """See `Tier`."""
        if len(content) > self._limit:
            return
        with self._lock:
            self._forget(key)
            while self._bytes + len(content) > self._limit:
                self._bytes -= len(self._kept.popitem(last=False)[1])
            # A copy: it may be part of what was read at once, which would be kept with it.
            self._kept[key] = memoryview(bytes(content))
            self._bytes += len(content)

    def drop(self, key: str) -> None:
        """See `Tier`."""
        with self._lock:
            self._forget(key)

    def lease(self, key: str) -> AbstractContextManager[object]:
        """Nobody else shares it."""
        return nullcontext()

    def _forget(self, key: str) -> None:
        if key in self._kept:
            self._bytes -= len(self._kept.pop(key))


class DiskTier:
    """A folder of files on a local disk, shared by the ranks of a node.

    A file appears by rename, so nobody reads half of one; removing one that is being read does not disturb the reader.
    Nothing is synced: what a crash leaves of a file is found by its hash. Files are in 16 folders, and leases are locks
    on bytes of one file, because making a folder or the first file in it costs more than writing a block; the kernel
    gives locks back when their holder dies. The bytes in use are a number in a file, changed under a lock, counted anew
    when the tier is emptied.
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
                with open(self._created(partial), "wb", buffering=0) as stream:
                    if stream.write(content) != len(content):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
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
        rooms = self._rooms.setdefault(size, Rooms(size))
        return rooms.array(num_bytes, np.uint8).data

    def _created(self, path: str) -> int:
        """The descriptor of a new file, in a folder that may be new."""
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        try:
            return os.open(path, flags, 0o666)
        except FileNotFoundError:
            with suppress(FileExistsError):
                os.mkdir(os.path.dirname(path))
            return os.open(path, flags, 0o666)

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


class RedisTier:
    """A Redis server or cluster; bounded by the server's own memory limit, entries end after a time."""

    def __init__(self, config: RedisTierConfig) -> None:
        self.name = "redis"
        self.counters = TierCounters()
        self._seconds = config.ttl_seconds
        self._paused_until = 0.0
        self._is_cluster = config.cluster
        self._client = _redis_client(config)

    def get(self, key: str) -> memoryview | None:
        """See `Tier`."""
        content = self._asked(lambda: self._client.get(_redis_key(key)))
        return None if content is None else memoryview(content)

    def put(self, key: str, content: memoryview) -> None:
        """See `Tier`."""
        self._asked(lambda: self._client.set(_redis_key(key), bytes(content), ex=self._seconds))

    def drop(self, key: str) -> None:
        """See `Tier`."""
        self._asked(lambda: self._client.delete(_redis_key(key)))

    def lease(self, key: str) -> AbstractContextManager[object]:
        """Fetching a block twice costs less than agreeing on who does."""
        return nullcontext()

    def check(self) -> None:
        """Make sure the server is there and bounded.

        Raises:
            DataError: it does not answer, or would grow or refuse writes instead of dropping what is old.
        """
        import redis

        try:
            target = {"target_nodes": "random"} if self._is_cluster else {}
            settings = self._client.config_get("maxmemory*", **target)
        except (redis.RedisError, OSError) as error:
            raise DataError(f"data.tiers: Redis does not answer ({error}). Start it, or leave the tier out.") from error
        if not int(settings.get("maxmemory", 0)) or settings.get("maxmemory-policy") == "noeviction":
            raise DataError(
                f"data.tiers: Redis has maxmemory={settings.get('maxmemory')} and maxmemory-policy="
                f"{settings.get('maxmemory-policy')}; a cache needs a bound and drops what is old. "
                "Set maxmemory, and maxmemory-policy allkeys-lru."
            )

    def _asked(self, ask: Any) -> Any:
        """An answer, or None from a server that fails; one that fails is left alone for a while."""
        import redis

        if time.monotonic() < self._paused_until:
            return None
        try:
            return ask()
        except (redis.RedisError, OSError):
            self.counters.failures += 1
            self._paused_until = time.monotonic() + PAUSE_SECONDS
            return None


def open_tiers(configs: Sequence[TierConfig]) -> list[Tier]:
    """The tiers of a configuration, in its order.

    Raises:
        DataError: one cannot be opened.
    """
    tiers: list[Tier] = []
    for config in configs:
        match config:
            case MemoryTierConfig():
                tiers.append(MemoryTier(config))
            case DiskTierConfig():
                tiers.append(DiskTier(config))
            case RedisTierConfig():
                tiers.append(RedisTier(config))
    return tiers


def check_tiers(configs: Sequence[TierConfig]) -> None:
    """Make sure that servers of tiers are there and bounded, before anything is launched.

    Raises:
        DataError: one is not.
    """
    for config in configs:
        if isinstance(config, RedisTierConfig):
            RedisTier(config).check()


def _redis_client(config: RedisTierConfig) -> Any:
    """A client; user and password are in the environment (REDIS_USERNAME, REDIS_PASSWORD), never in the URL."""
    import redis

    options: dict[str, Any] = {
        "username": os.environ.get("REDIS_USERNAME"),
        "password": os.environ.get("REDIS_PASSWORD"),
        "socket_timeout": config.request_seconds,
        "socket_connect_timeout": config.request_seconds,
    }
    try:
        if config.cluster:
            return redis.RedisCluster.from_url(config.url, **options)
        return redis.Redis.from_url(config.url, **options)
    except (redis.RedisError, ValueError, OSError) as error:
        raise DataError(f"data.tiers: {config.url} cannot be opened ({error}). Write redis://HOST:PORT.") from error


def _redis_key(key: str) -> str:
    return f"block:{key}"


def _number(content: bytes) -> int:
    return int(struct.unpack("<q", content)[0]) if len(content) == 8 else 0
