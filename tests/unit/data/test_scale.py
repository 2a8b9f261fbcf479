"""Opening costs the same whatever the size: index and order of eight million shards, and a thousand data ranks."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.resume import BLOCK_TOKENS, SHARD_BLOCKS, write_index
from conf.schema import ShuffleConfig
from data.rows import RowReader
from data.samples import StreamSpec
from data.shards import Dataset
from data.stream import Stream

OPEN = """
import json, sys, time
from pathlib import Path
import numpy as np
from data.shards import Dataset
from data.samples import StreamSpec
from data.stream import Stream
started = time.process_time()
dataset = Dataset.open(sys.argv[1])
spec = StreamSpec(mixtures=[(0, {"big": 1.0})], seed=1, sequence_length=8192, global_batch=2048, micro_batch=1)
Stream({"big": dataset}, spec).samples(np.arange(10**9, 10**9 + 2048))
dataset.part("train", 0)
# Not getrusage: its peak is inherited from the process that started this one.
(peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
mib = int(peak.split()[1]) / 1024
print(json.dumps([time.process_time() - started, mib, dataset.num_shards("train")]))
"""


def test_opening_eight_million_shards_takes_no_more_than_ten_thousand(tmp_path: Path) -> None:
    results = []
    for count in (10_240, 8_000_512):
        root = tmp_path / str(count)
        root.mkdir()
        write_index(root, count, {})
        done = subprocess.run([sys.executable, "-c", OPEN, str(root)], capture_output=True, text=True, check=True)
        results.append(json.loads(done.stdout))
    print(results)
    (_, small_mib, few), (seconds, mib, many) = results
    assert (few, many) == (10_240, 8_000_512)
    # Of CPU: other tests may have the cores at the time.
    assert seconds < 2
    assert mib < 300
    assert mib < small_mib + 30


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Stream:
    root = tmp_path_factory.mktemp("big")
    write_index(root, 8_000_512, {})
    spec = StreamSpec(
        mixtures=[(0, {"big": 1.0})],
        seed=1,
        sequence_length=8192,
        global_batch=3072,
        micro_batch=1,
        shuffle=ShuffleConfig(lanes=1024),
    )
    return Stream({"big": Dataset.open(root)}, spec)


@pytest.mark.parametrize("data_size", [1, 2, 3, 4, 8, 64, 1024])
def test_data_ranks_together_plan_the_same_global_batch(big: Stream, data_size: int) -> None:
    whole = [(sample.id, sample.first_token) for sample in big.samples(big.sample_ids(100_000))]
    share = 3072 // data_size
    shared = []
    for rank in range(data_size):
        reader = RowReader(big, 100_000, rank * share, share)
        shared += (reader._blocks[0] * BLOCK_TOKENS + reader._starts[0]).tolist()
    assert shared == [first for _, first in whole]


def test_each_data_rank_reads_few_blocks_and_no_two_the_same(big: Stream) -> None:
    steps = 64  # of 3 samples a lane, blocks hold 32: 192 of a window's 1024 samples
    owners: dict[int, int] = {}
    for rank in range(0, 1024, 128):
        reader = RowReader(big, 0, rank * 3, 3)
        reader._work_out(steps - 1)
        for block in np.unique(reader._blocks).tolist():
            assert owners.setdefault(block, rank) == rank
    assert len(owners) <= 8 * 32


NUM_READERS = 2048
STEP_SECONDS = NUM_READERS * 8192 / 2.3e6
"""Of 2,048 rows of 8,192 tokens at the 2.3M tokens/s of as many GPUs."""
GETS_PER_SECOND = 5500
"""What S3 gives a prefix; all shards of a dataset are under one."""


def test_two_thousand_readers_stay_inside_the_request_rate_of_a_prefix(
    big: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = big.sources[0].dataset
    requests: list[int] = []
    monkeypatch.setattr(dataset, "expect", lambda split, numbers: requests.extend(numbers))
    spec = dataclasses.replace(
        big.spec, global_batch=NUM_READERS, shuffle=ShuffleConfig(lanes=NUM_READERS, readahead_blocks=16)
    )
    some = range(0, NUM_READERS, 256)
    num_steps = 8 * 1024  # windows of 32 blocks with 32 samples each; more than are worked out at once
    per_step = np.zeros(num_steps, np.int64)
    asked: list[int] = []
    part_blocks = dataset.part_shards("train") * SHARD_BLOCKS
    parts_at_start = 0
    for rank in some:
        reader = RowReader(Stream({"big": dataset}, spec), 0, rank, 1)
        for step in range(num_steps):
            reader.read_ahead(step)
            per_step[step] += len(requests)
            parts_at_start += 0 if step else len({number // part_blocks for number in requests})
            asked += requests
            requests.clear()
    assert len(set(asked)) == len(asked), "a block is asked for once"
    per_second = per_step * (NUM_READERS / len(some)) / STEP_SECONDS
    start_up, busiest, mean = per_second[0], per_second[1:].max(), per_second[1:].mean()
    blocks, parts = per_step[0] / len(some), parts_at_start / len(some)
    print(
        f"GET/s: mean {mean:.1f}, busiest step {busiest:.0f}; a reader's start: {blocks:.0f} blocks, {parts:.0f} parts"
    )
    # 262,144 tokens a block, each read once; the first step asks for what is read ahead as well.
    assert mean < 1.1 * 2.3e6 / BLOCK_TOKENS
    assert busiest < GETS_PER_SECOND / 10
    assert start_up * STEP_SECONDS / GETS_PER_SECOND < 10, "seconds until all readers have what they read ahead"
