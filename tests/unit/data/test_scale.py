"""Opening costs the same whatever the size: index and order of eight million shards, and a thousand data ranks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conf.schema import ShuffleConfig
from data import stream as stream_module
from data.index import (
    PART_SHARDS,
    SPLITS,
    Manifest,
    ShardEntry,
    Totals,
    identity_of,
    part_bytes,
    part_name,
    part_row,
    root_bytes,
    root_name,
)
from data.shards import Dataset
from data.stream import Stream, StreamSpec

SHARD_BLOCKS = 128
BLOCK_TOKENS = 1 << 18
SHARD_BYTES = 62_500_000


def synthesise(root: Path, num_shards: int) -> None:
    """A dataset's index without its shards: parts of the first 20 are written, of the others only the hash."""
    digest = hashlib.sha256(b"").digest()
    size = SHARD_BYTES // SHARD_BLOCKS
    starts = tuple(136 + number * size for number in range(SHARD_BLOCKS + 1))
    hashes = tuple(hashlib.md5(bytes([number])).digest() for number in range(SHARD_BLOCKS))
    entry = ShardEntry(
        path="",
        num_documents=1000,
        num_tokens=SHARD_BLOCKS * BLOCK_TOKENS,
        num_bytes=SHARD_BYTES,
        documents_sha256=digest,
        storage_class="STANDARD",
        block_starts=starts,
        block_hashes=hashes,
    )
    totals, roots = {}, []
    for split in SPLITS:
        count = num_shards if split == "train" else 1
        rows = []
        for part in range(-(-count // PART_SHARDS)):
            numbers = range(part * PART_SHARDS, min(count, (part + 1) * PART_SHARDS))
            if part == 0 or len(numbers) != PART_SHARDS:
                paths = [f"{split}/shards/{number:08d}.arrow" for number in numbers]
                entries = [dataclasses.replace(entry, path=path) for path in paths]
                content = part_bytes(entries)
                (root / part_name(split, part)).parent.mkdir(parents=True, exist_ok=True)
                (root / part_name(split, part)).write_bytes(content)
                row = part_row(entries, content)
            rows.append(
                {**row, "part_sha256": row["part_sha256"] if part == 0 else hashlib.sha256(b"%d" % part).digest()}
            )
        totals[split] = Totals(
            **{name: sum(int(str(row[name])) for row in rows) for name in Totals.__dataclass_fields__}
        )
        roots.append(root_bytes(rows))
        (root / root_name(split)).write_bytes(roots[-1])
    manifest = Manifest(
        format_version=2,
        identity="",
        tokenizer_sha256="t",
        vocab_size=50_000,
        end_of_text_id=0,
        held_out_fraction=0.1,
        num_duplicates=0,
        block_tokens=BLOCK_TOKENS,
        shard_blocks=SHARD_BLOCKS,
        splits=totals,
        inputs=(),
    )
    manifest = dataclasses.replace(manifest, identity=identity_of(manifest, roots))
    (root / "dataset.json").write_bytes(manifest.to_json())


OPEN = """
import json, sys, time
from pathlib import Path
import numpy as np
from data.shards import Dataset
from data.stream import Stream, StreamSpec
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
        synthesise(root, count)
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
    synthesise(root, 8_000_512)
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
def test_data_ranks_together_plan_the_same_global_batch(
    big: Stream, data_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "PLANNED_SAMPLES", 64)
    whole = [(sample.id, sample.first_token) for sample in big.samples(big.sample_ids(100_000))]
    share = 3072 // data_size
    shared = []
    for rank in range(data_size):
        plan = big._planned(100_000, rank * share, share)
        shared += plan.first_tokens[100_000 - plan.first_step].tolist()
    assert shared == [first for _, first in whole]


def test_each_data_rank_reads_few_blocks_and_no_two_the_same(big: Stream) -> None:
    steps = 64  # of 3 samples a lane, blocks hold 32: 192 of a window's 1024 samples
    owners: dict[int, int] = {}
    for rank in range(0, 1024, 128):
        plan = big._planned(0, rank * 3, 3)
        for block in np.unique(plan.first_tokens[:steps] // BLOCK_TOKENS).tolist():
            assert owners.setdefault(block, rank) == rank
    assert len(owners) <= 8 * 32
