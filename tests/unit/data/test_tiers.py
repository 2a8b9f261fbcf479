from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import MakeDataset

from conf.schema import DiskTierConfig
from data.disk import DiskTier
from data.index import part_name
from data.shards import Access, Dataset
from data.tiers import open_tiers


def disk(folder: Path) -> DiskTierConfig:
    return DiskTierConfig(kind="disk", path=str(folder), num_bytes=1 << 30)


def test_a_lease_is_held_by_one_thread_and_keeps_nobody_from_other_blocks(tmp_path: Path) -> None:
    one, other = DiskTier(disk(tmp_path)), DiskTier(disk(tmp_path))
    key, neighbour = "ab" * 16, "ac" + "ab" * 15
    holders: list[int] = []

    def hold(tier: DiskTier) -> None:
        with tier.lease(key):
            holders.append(threading.get_ident())
            assert len(holders) == 1
            # Long enough for the others to come.
            threading.Event().wait(0.02)
            holders.clear()

    with ThreadPoolExecutor(4) as pool:
        with one.lease(key):
            waiting = [pool.submit(hold, tier) for tier in (one, other, one, other)]
            with other.lease(neighbour):
                pass
            assert not holders
        for each in waiting:
            each.result()


def test_a_part_of_the_index_is_read_by_one_of_those_who_share_a_disk(
    make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = make_dataset().path
    # A lock is of an open file: two of a process keep each other out as two processes do.
    first, second = (Dataset.open(location, Access(tiers=open_tiers([disk(tmp_path / "tier")]))) for _ in range(2))
    before = second.store.counters.requests
    reading, go_on, read = threading.Event(), threading.Event(), first.store.read

    def read_slowly(name: str) -> memoryview:
        reading.set()
        assert go_on.wait(10)
        return read(name)

    monkeypatch.setattr(first.store, "read", read_slowly)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first.part, "train", 0)
        assert reading.wait(10)
        other = pool.submit(second.part, "train", 0)
        with pytest.raises(TimeoutError):
            other.result(timeout=0.1)
        go_on.set()
        assert one.result().path(0) == other.result().path(0)
    assert second.store.counters.requests == before


def test_a_warm_disk_tier_has_the_index_too_and_damage_in_it_is_noticed(
    make_dataset: MakeDataset, tmp_path: Path
) -> None:
    location = make_dataset().path

    def opened() -> Dataset:
        return Dataset.open(location, Access(tiers=open_tiers([disk(tmp_path / "tier")])))

    expected = opened().tokens("train", 0, 1000)
    warm = opened()
    before = warm.store.counters.requests
    assert np.array_equal(warm.tokens("train", 0, 1000), expected)
    assert warm.store.counters.requests == before
    for file in (tmp_path / "tier").glob("[0-9a-f]/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert np.array_equal(opened().tokens("train", 0, 1000), expected)
    (Path(location) / part_name("train", 0)).unlink()
    assert np.array_equal(opened().tokens("train", 0, 1000), expected), "what was damaged was put there again"
