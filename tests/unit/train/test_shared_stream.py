"""Ranks of one node as threads, each with a dataset of its own; the files say who read."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from random_tokens import stream_over, write_dataset
from torch import distributed as dist

from conf.errors import DataError
from data.batch import Batch
from data.prefetch import Prefetch
from data.shards import Dataset
from data.storage import Store
from data.stream import Stream
from parallel.mesh import Mesh
from train.shared_stream import SharedStream
from train.worker import Place

STEPS = 12

T = TypeVar("T")


@pytest.fixture(scope="module")
def location(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shared") / "set"
    write_dataset(Store.open(path), num_documents=40, document_tokens=512, block_tokens=256, shard_blocks=4)
    return path


def opened(location: Path) -> Stream:
    return stream_over(Dataset.open(location), reset_at_documents=True)


class Ranks:
    """Ranks of a mesh on nodes of some ranks, the first of which may be taken by another world."""

    def __init__(self, location: Path, mesh: Mesh, on_node: int, taken: int = 0) -> None:
        store = dist.HashStore()
        self.mesh, self.numbers = mesh, range(mesh.world_size)
        self.streams = [opened(location) for _ in self.numbers]
        places = [
            Place(
                rank=rank,
                world_size=mesh.world_size,
                local_rank=(rank + taken) % on_node,
                ranks_on_node=on_node,
                master_address="",
                master_port=0,
            )
            for rank in self.numbers
        ]
        self.shared = self.on_all(lambda rank: SharedStream(self.streams[rank], mesh, places[rank], store, "stage"))

    def on_all(self, work: Callable[[int], T]) -> list[T]:
        with ThreadPoolExecutor(len(self.numbers)) as pool:
            return list(pool.map(work, self.numbers))

    def steps(self, steps: range) -> list[list[list[Batch]]]:
        return self.on_all(lambda rank: [self.shared[rank].batches(step) for step in steps])

    def readers(self) -> list[int]:
        """Ranks that asked the storage for more than a dataset is opened by."""
        return [rank for rank in self.numbers if self.streams[rank].counters()[0]["requests"] > 3]

    def close(self) -> None:
        for shared, stream in zip(self.shared, self.streams, strict=True):
            shared.close()
            stream.sources[0].dataset.close()


@pytest.mark.parametrize(
    ("mesh", "on_node", "taken", "readers"),
    [
        (Mesh(), 1, 0, [0]),
        (Mesh(tensor=2, data=2), 4, 0, [0, 2]),
        (Mesh(tensor=2, pipeline=2, data=2), 4, 0, [0, 2, 4, 6]),
        (Mesh(tensor=2, pipeline=2, data=2), 8, 0, [0, 2]),
        (Mesh(context=2, data=2), 4, 2, [0, 2]),
        (Mesh(context=2, data=2), 4, 3, [0, 1, 2]),
    ],
    ids=str,
)
def test_one_rank_of_a_node_reads_for_all_that_see_its_rows(
    location: Path, mesh: Mesh, on_node: int, taken: int, readers: list[int]
) -> None:
    ranks, alone = Ranks(location, mesh, on_node, taken), opened(location)
    for rank, steps in enumerate(ranks.steps(range(5, STEPS))):
        data = mesh.coordinate(rank).data
        for step, batches in enumerate(steps, 5):
            for batch, expected in zip(batches, alone.batches(step, data, mesh.data), strict=True):
                assert batch.tokens_BS.dtype == expected.tokens_BS.dtype
                for field in ("tokens_BS", "labels_BS", "position_ids_BS", "sample_ids_B"):
                    assert np.array_equal(getattr(batch, field), getattr(expected, field))
    assert ranks.readers() == readers
    ranks.close()


def test_what_cannot_be_read_is_told_on_every_rank_that_sees_it(location: Path, tmp_path: Path) -> None:
    broken = tmp_path / "set"
    shutil.copytree(location, broken)
    for shard in (broken / "train/shards").iterdir():
        shard.write_bytes(shard.read_bytes()[:-1000].ljust(shard.stat().st_size, b"\0"))
    ranks = Ranks(broken, Mesh(tensor=2, data=2), 4)

    def error_of(rank: int) -> str:
        with pytest.raises(DataError) as caught:
            for step in range(200):
                ranks.shared[rank].batches(step)
        return str(caught.value)

    errors = ranks.on_all(error_of)
    assert all(re.search(r"train/shards/\d+\.arrow: corrupt shard", error) for error in errors), errors
    assert errors[0] == errors[1]
    assert errors[2] == errors[3]
    ranks.close()


def test_who_waits_for_another_rank_can_be_stopped_and_learns_of_its_end(location: Path) -> None:
    ranks = Ranks(location, Mesh(tensor=3), 3)
    waiting = ranks.shared[1]
    with Prefetch(waiting.batches, range(9), depth=1, interrupt=waiting.give_up):
        pass  # returns although rank 0 never reads
    ranks.shared[0].close()
    with pytest.raises(DataError, match="sees the same rows has ended"):
        ranks.shared[2].batches(0)
    ranks.close()


def test_a_reader_whose_rows_nobody_takes_can_be_stopped(location: Path) -> None:
    ranks = Ranks(location, Mesh(context=2), 2)
    reading = ranks.shared[0]
    # More than a socket holds.
    with Prefetch(reading.batches, range(10_000), depth=10_000, interrupt=reading.give_up):
        time.sleep(0.5)
    ranks.close()
    ranks = Ranks(location, Mesh(context=2), 2)
    ranks.shared[1].close()
    with pytest.raises(DataError, match="sees the same rows has ended"):
        for step in range(2):
            ranks.shared[0].batches(step)
    ranks.close()
