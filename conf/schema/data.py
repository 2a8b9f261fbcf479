"""Where text comes from, how it is kept near, and in which order it is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from conf.schema.types import PositiveFloat, PositiveInt, Strict


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig(Strict):
    """One corpus."""

    path: str
    """Text, jsonl or parquet file(s) or a prepared dataset; `shipped:NAME` for a corpus that comes with the project."""
    max_epochs: PositiveFloat | None = None
    """Passes over it that a stage may make; null: any number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageConfig(Strict):
    """How object storage is spoken to. Credentials are never here: they come from the provider's own chain."""

    endpoint: str | None = None
    """Null: the provider's, or AWS_ENDPOINT_URL. `http://` switches TLS off."""
    region: str | None = None
    """Null: AWS_REGION or the profile's."""
    request_seconds: PositiveFloat = 20.0
    """Longest a single request may take."""
    retry_seconds: PositiveFloat = 120.0
    """Failed requests are tried again for this long."""
    encryption: Literal["bucket_default", "sse_s3", "sse_kms"] = "bucket_default"
    """Of objects that are written."""
    kms_key_id: str | None = None
    """For sse_kms; null: the account's default key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryTierConfig(Strict):
    """Host memory of each rank, for blocks as they are stored."""

    kind: Literal["memory"]
    num_bytes: PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskTierConfig(Strict):
    """A folder on a disk of each node, shared by its ranks."""

    kind: Literal["disk"]
    path: str
    num_bytes: PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class RedisTierConfig(Strict):
    """A Redis server or cluster; user and password come from REDIS_USERNAME and REDIS_PASSWORD."""

    kind: Literal["redis"]
    url: str
    """redis:// or rediss:// with host and port, without a password."""
    num_bytes: PositiveInt
    """What it holds; must not be above the server's (or all the cluster's) maxmemory."""
    cluster: bool = False
    ttl_seconds: PositiveInt = 7 * 86400
    request_seconds: PositiveFloat = 2.0


TierConfig = Annotated[MemoryTierConfig | DiskTierConfig | RedisTierConfig, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShuffleConfig(Strict):
    """How far samples are mixed, for sources that do not fit the window; smaller ones are shuffled as a whole."""

    lanes: PositiveInt = 16
    """Contiguous shares of the global batch that read for themselves; up to as many data ranks read nothing twice.
    The largest divisor of the global batch up to this is used."""
    window_blocks: PositiveInt = 32
    """Blocks a lane mixes at a time. The more, the nearer to uniform (32: 0.97) and the more memory."""
    readahead_blocks: PositiveInt = 16
    """Blocks a rank asks for before they are needed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(Strict):
    """Where text comes from and how it becomes tokens."""

    tokenizer: str
    """Path of a `tokenizer.json`, or `shipped:NAME`."""
    sources: dict[str, SourceConfig]
    held_out_fraction: Annotated[float, Field(gt=0, lt=0.5)]
    """Share of documents, chosen by hash, that is never trained on."""
    cache_dir: str
    """Prepared datasets are kept here, each under its identity."""
    reset_at_documents: bool = False
    """In rows that hold several documents, positions and attention begin anew with each of them."""
    tiers: tuple[TierConfig, ...] = ()
    """Caches between ranks and storage, fastest first."""
    shuffle: ShuffleConfig = field(default_factory=ShuffleConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
