"""How soon a rank that resumes has its first batch, in a dataset of so many shards that most exist in the index alone.

python -m bench.resume [--shards 8000512] [--rows 1 8 32] [--rounds 5]

What a step in the middle needs is written, blocks and parts of the index with hashes of their own; then new processes
open the dataset and make that step's rows: the first with an empty disk tier, the others with what it left there.
Imports are left out, as they are paid once a job. No server is in it: the dataset is a local folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from conf.schema import DiskTierConfig
from data.index import (
    GROUP_BLOCKS,
    PART_SHARDS,
    SPLITS,
    Manifest,
    ShardEntry,
    Split,
    Totals,
    identity_of,
    part_bytes,
    part_name,
    part_row,
    root_bytes,
    root_name,
)
from data.samples import StreamSpec
from data.shards import Access, Dataset
from data.stream import Stream
from data.tiers import open_tiers
from data.writer import block_hashes, token_shard_bytes, totals_of

SHARD_BLOCKS = 128
BLOCK_TOKENS = 1 << 18
BLOCK_BYTES = 300_000
"""As stored: more than any block here takes, the rest is padding."""
STEPS = 16
"""Steps whose blocks are written: more than are read ahead of the first."""
GLOBAL_BATCH = 2048


def main() -> None:
    """Write, then resume in processes of their own, then print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=8_000_512)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 32], help="of the rank that resumes")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print("| rows | blocks | parts of the index | cold s | warm s, median | warm CPU-s |\n" + "| --- " * 6 + "|")
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as scratch:
            needed = write(Path(scratch), options.shards, rows)
            command = [sys.executable, "-m", "bench.resume", "--one", scratch, str(options.shards), str(rows)]
            runs = [json.loads(subprocess.check_output(command)) for _ in range(options.rounds + 1)]
            parts = {block // (PART_SHARDS * SHARD_BLOCKS) for block in needed}
            seconds, cpu = (statistics.median(run[place] for run in runs[1:]) for place in (0, 1))
            print(
                f"| {rows} | {len(needed)} | {len(parts)} | {runs[0][0]:.3f} | {seconds:.3f} | {cpu:.3f} |", flush=True
            )


def resume(root: Path, num_shards: int, rows: int) -> tuple[float, float]:
    """Seconds, and CPU seconds, from nothing open to the first rows."""
    started, cpu = time.perf_counter(), time.process_time()
    tiers = open_tiers([DiskTierConfig(kind="disk", path=str(root / "tier"), num_bytes=8 << 30)])
    stream_of(Dataset.open(root, Access(tiers=tiers))).rows(step_of(num_shards), 0, rows)
    return time.perf_counter() - started, time.process_time() - cpu


def stream_of(dataset: Dataset) -> Stream:
    """Rows of 8,192 tokens, 2,048 a step."""
    spec = StreamSpec(
        mixtures=[(0, {"big": 1.0})], seed=1, sequence_length=8192, global_batch=GLOBAL_BATCH, micro_batch=1
    )
    return Stream({"big": dataset}, spec)


def step_of(num_shards: int) -> int:
    """The step in the middle of the first pass."""
    return num_shards * SHARD_BLOCKS * BLOCK_TOKENS // (8192 * GLOBAL_BATCH) // 2


def write(root: Path, num_shards: int, rows: int) -> list[int]:
    """A dataset in which a rank of some rows finds what it reads for a step; returns the blocks of that step."""
    write_index(root, num_shards, {})
    order, step = stream_of(Dataset.open(root)), step_of(num_shards)
    steps = [order.samples(order.sample_ids(step + later)[:rows]) for later in range(STEPS)]
    blocks = [sorted({sample.first_token // BLOCK_TOKENS for sample in samples}) for samples in steps]
    groups = {block // GROUP_BLOCKS for each in blocks for block in each}
    numbers = [group * GROUP_BLOCKS + place for group in sorted(groups) for place in range(GROUP_BLOCKS)]
    stored = {number: stored_block(number) for number in numbers}
    write_index(root, num_shards, stored)
    for block, content in stored.items():
        shard, place = divmod(block, SHARD_BLOCKS)
        path = root / f"train/shards/{shard:08d}.arrow"
        path.parent.mkdir(exist_ok=True)
        with path.open("r+b" if path.exists() else "w+b") as stream:
            stream.seek(place * BLOCK_BYTES)
            stream.write(content)
    return blocks[0]


def stored_block(number: int) -> bytes:
    """A block with tokens of its own, as it is stored."""
    tokens = (np.random.default_rng(number).zipf(1.3, BLOCK_TOKENS + 1) % 50_000).astype(np.uint16)
    content, (start, end) = token_shard_bytes([tokens], np.uint16)
    return content[start:end].ljust(BLOCK_BYTES, b"\0")


def write_index(root: Path, num_shards: int, stored: dict[int, bytes]) -> None:
    """The index; of its parts those that blocks are stored of, and one of the held-out split."""
    totals: dict[Split, Totals] = {}
    roots = []
    parts = {block // (PART_SHARDS * SHARD_BLOCKS) for block in stored}
    for split in SPLITS:
        count = num_shards if split == "train" else 1
        rows = []
        for part in range(-(-count // PART_SHARDS)):
            shards = range(part * PART_SHARDS, min(count, (part + 1) * PART_SHARDS))
            if not rows or len(shards) < PART_SHARDS or (split == "train" and part in parts):
                entries = entries_of(split, shards, stored if split == "train" else {})
                content = part_bytes(entries)
                path = root / part_name(split, part)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                rows.append(part_row(entries, content))
            else:
                rows.append({**rows[0], "part_sha256": hashlib.sha256(b"%d" % part).digest()})
        totals[split] = totals_of(rows)
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
    (root / "dataset.json").write_bytes(dataclasses.replace(manifest, identity=identity_of(manifest, roots)).to_json())


def entries_of(split: Split, shards: range, stored: dict[int, bytes]) -> list[ShardEntry]:
    """Shards with hashes of their own, which do not compress; right ones for the blocks that are stored."""
    random = np.random.default_rng(shards.start)
    entries = []
    for shard in shards:
        blocks = range(shard * SHARD_BLOCKS, (shard + 1) * SHARD_BLOCKS)
        hashes = [
            block_hashes(stored[block], [0, BLOCK_BYTES])[0] if block in stored else random.bytes(16)
            for block in blocks
        ]
        entries.append(
            ShardEntry(
                path=f"{split}/shards/{shard:08d}.arrow",
                num_documents=1000,
                num_tokens=SHARD_BLOCKS * BLOCK_TOKENS,
                num_bytes=SHARD_BLOCKS * BLOCK_BYTES,
                documents_sha256=random.bytes(32),
                storage_class="STANDARD",
                block_starts=tuple(range(0, (SHARD_BLOCKS + 1) * BLOCK_BYTES, BLOCK_BYTES)),
                block_hashes=tuple(hashes),
            )
        )
    return entries


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(resume(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
    else:
        main()
