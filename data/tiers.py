"""Caches between a reader and the storage it reads from: host memory, a local disk, Redis; fastest first.

A tier holds copies of blocks that a store can give again, under the hash of their content: what it returns can always
be checked, is never out of date, and may be dropped at any time. Losing a tier costs time, never samples.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from conf.errors import DataError
from conf.schema import DiskTierConfig, MemoryTierConfig, RedisTierConfig, TierConfig
from data.disk import DiskTier
from data.tier import PAUSE_SECONDS, Tier, TierCounters


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


class RedisTier:
    """A Redis server or cluster; bounded by the server's own memory limit, entries end after a time."""

    def __init__(self, config: RedisTierConfig) -> None:
        self.name = "redis"
        self.counters = TierCounters()
        self._num_bytes = config.num_bytes
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
            DataError: it does not answer, holds less than `num_bytes`, or would grow or refuse writes instead of
                dropping what is old.
        """
        import redis

        try:
            # Not CONFIG GET, which managed servers refuse.
            if self._is_cluster:
                nodes = [self._client.info("memory", target_nodes=node) for node in self._client.get_primaries()]
            else:
                nodes = [self._client.info("memory")]
        except (redis.RedisError, OSError) as error:
            raise DataError(f"data.tiers: Redis does not answer ({error}). Start it, or leave the tier out.") from error
        for node in nodes:
            if not node["maxmemory"] or node["maxmemory_policy"] == "noeviction":
                raise DataError(
                    f"data.tiers: Redis has maxmemory={node['maxmemory']} and maxmemory-policy="
                    f"{node['maxmemory_policy']}; a cache needs a bound and drops what is old. "
                    "Set maxmemory, and maxmemory-policy allkeys-lru."
                )
        held = sum(node["maxmemory"] for node in nodes)
        if held < self._num_bytes:
            raise DataError(
                f"data.tiers: num_bytes={self._num_bytes} of Redis, whose maxmemory is {held} over "
                f"{len(nodes)} servers. Set num_bytes to what it holds, or give it more memory."
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
