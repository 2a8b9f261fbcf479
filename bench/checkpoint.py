"""Saving and loading a checkpoint, against writing the same bytes and against others' formats.

    python -m bench.checkpoint [--quick] [--directory DIR]

Four processes hold 1 GB of float32 between them. Each way of saving runs in turn, several rounds over, in the same
processes and on the same disk, from a barrier until the last rank's bytes are durable (fsync). Ratios are between
medians; the disk of a shared machine varies by more than the ways differ, so look at the spread as well.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.settings import dense_model, engine_of
from parallel.engine import Piece
from train.checkpoint import Checkpoint
from train.manifest import Provenance
from train.saver import Saver

NUM_RANKS = 4
TENSORS_PER_RANK = 16
Work = Callable[[], object]
Row = tuple[str, float, float]
"""What was done, seconds until the call returned, seconds until all was done; of this rank."""


@dataclass(kw_only=True)
class Rank:
    """One of the processes."""

    rank: int
    total_bytes: int
    directory: Path
    barrier: Barrier
    rounds: int
    rows: list[Row] = field(default_factory=list)
    saver: Saver | None = None

    def timed(self, name: str, call: Work, finish: Work = lambda: None) -> None:
        """Time `call`, then `finish`, from a common start."""
        self.barrier.wait()
        started = time.perf_counter()
        call()
        blocked = time.perf_counter() - started
        finish()
        self.rows.append((name, blocked, time.perf_counter() - started))
        self.barrier.wait()

    def empty_page_cache(self) -> None:
        """Let what is loaded next come from the disk, however it was written."""
        self.barrier.wait()
        for path in self.directory.rglob("*") if self.rank == 0 else ():
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_rank(rank: Rank, address: str, results: multiprocessing.Queue[list[Row]]) -> None:
    """Save and load in every way, round by round."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank.rank, world_size=NUM_RANKS)
    values = torch.arange(rank.total_bytes // NUM_RANKS // 4, dtype=torch.float32).chunk(TENSORS_PER_RANK)
    tensors = {f"rank{rank.rank}.layer{i}": value for i, value in enumerate(values)}
    rank.saver = Saver(rank.directory, rank=rank.rank, world_size=NUM_RANKS, keep=1)
    for round_number in range(rank.rounds):
        ways = [plain, ours, safetensors_library, distributed_checkpoint]
        # Turn by turn, so that none always comes after the same other.
        for way in ways[round_number % 4 :] + ways[: round_number % 4]:
            way(rank, tensors, round_number)
            rank.barrier.wait()
            if rank.rank == 0:
                shutil.rmtree(rank.directory)
                rank.directory.mkdir()
                os.sync()
            rank.barrier.wait()
    dist.destroy_process_group()
    results.put(rank.rows)


def plain(rank: Rank, tensors: dict[str, Tensor], round_number: int) -> None:
    """Write and fsync one file a rank: what the disk takes."""
    path = rank.directory / f"plain-{rank.rank}"

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            for tensor in tensors.values():
                contents = tensor.numpy().data.cast("B")
                while contents:
                    contents = contents[file.write(contents[: 8 << 20]) :]
            os.fsync(file.fileno())

    def read() -> None:
        with path.open("rb", buffering=0) as file:
            for tensor in tensors.values():
                target = memoryview(bytearray(tensor.nbytes))
                while target:
                    target = target[file.readinto(target) :]

    rank.timed("save: plain write + fsync", write)
    rank.empty_page_cache()
    rank.timed("load: plain read", read)


def ours(rank: Rank, tensors: dict[str, Tensor], round_number: int) -> None:
    """Copy, hash, write, fsync, manifest; then read back with every hash checked."""
    saver = rank.saver
    assert saver is not None
    pieces = [Piece(name, tuple(tensor.shape), (0,), tensor) for name, tensor in tensors.items()]

    def save() -> None:
        saver.save(round_number, weights=pieces[:4], resume=pieces[4:], provenance=provenance(), samples=0, tokens=0)

    def load() -> None:
        checkpoint = Checkpoint.open(rank.directory / f"step-{round_number:08d}")
        for i, (name, tensor) in enumerate(tensors.items()):
            half = checkpoint.weights if i < 4 else checkpoint.resume
            half.read(name, (0,), tuple(tensor.shape))

    rank.timed("save: ours", save, saver.wait)
    rank.empty_page_cache()
    rank.timed("load: ours, hashes checked", load)


def safetensors_library(rank: Rank, tensors: dict[str, Tensor], round_number: int) -> None:
    """One file a rank by the safetensors library, without hashes."""
    path = rank.directory / f"{rank.rank}.safetensors"

    def save() -> None:
        save_file(tensors, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())

    rank.timed("save: safetensors + fsync", save)
    rank.empty_page_cache()
    # The library maps the file: a copy makes it read what the others read.
    rank.timed("load: safetensors, unchecked", lambda: [value.clone() for value in load_file(path).values()])


def distributed_checkpoint(rank: Rank, tensors: dict[str, Tensor], round_number: int) -> None:
    """torch.distributed.checkpoint, which syncs its files by default."""
    path = rank.directory / "dcp"
    empty = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    rank.timed("save: torch DCP", lambda: dcp.save(tensors, checkpoint_id=path))
    rank.empty_page_cache()
    rank.timed("load: torch DCP, unchecked", lambda: dcp.load(empty, checkpoint_id=path))


def provenance() -> Provenance:
    """Of no run."""
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_kv_heads", "head_dim")
    model = dense_model(name="bench", vocab_size=1, max_sequence_length=1, **dict.fromkeys(sizes, 1))
    engine = engine_of(mesh={"data": NUM_RANKS})
    return Provenance(run="", recipe="", stage="", model=model, engine=engine, tokenizer="0" * 64, data={}, parents=())


def report(rows_of_rank: list[list[Row]], total_bytes: int) -> Table:
    """Median over rounds of the slowest rank, and its ratio to the plain way."""
    blocked: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    for rows in zip(*rows_of_rank, strict=True):
        blocked.setdefault(rows[0][0], []).append(max(row[1] for row in rows))
        seconds.setdefault(rows[0][0], []).append(max(row[2] for row in rows))
    table = Table("what", title=f"{total_bytes / 1e9:.3g} GB over {NUM_RANKS} processes, {os.cpu_count()} cores")
    for title in ("blocked s", "until done s", "spread", "GB/s", "ratio to plain"):
        table.add_column(title, justify="right", no_wrap=True)
    for name in sorted(seconds, key=lambda name: not name.startswith("save")):
        median = statistics.median(seconds[name])
        plain_name = next(other for other in seconds if other.startswith(f"{name[:4]}: plain"))
        table.add_row(
            name,
            f"{statistics.median(blocked[name]):.2f}",
            f"{median:.2f}",
            f"{min(seconds[name]):.2f}-{max(seconds[name]):.2f}",
            f"{total_bytes / median / 1e9:.2f}",
            f"{median / statistics.median(seconds[plain_name]):.2f}",
        )
    return table


def main() -> None:
    """Start the ranks, wait for them, print."""
    parser = argparse.ArgumentParser(prog="python -m bench.checkpoint", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="64 MB and 2 rounds, to see that it runs")
    parser.add_argument("--directory", type=Path, help="on the disk to measure; default: the temporary directory")
    chosen = parser.parse_args()
    total_bytes, rounds = (64_000_000, 2) if chosen.quick else (1_000_000_000, 7)
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[list[Row]] = context.Queue()
    barrier = context.Barrier(NUM_RANKS, timeout=300)
    with tempfile.TemporaryDirectory(dir=chosen.directory) as directory:
        address = f"file://{directory}/rendezvous"
        (Path(directory) / "files").mkdir()
        processes = [
            context.Process(
                target=run_rank,
                args=(
                    Rank(
                        rank=rank,
                        total_bytes=total_bytes,
                        directory=Path(directory) / "files",
                        barrier=barrier,
                        rounds=rounds,
                    ),
                    address,
                    results,
                ),
                daemon=True,
            )
            for rank in range(NUM_RANKS)
        ]
        for process in processes:
            process.start()
        rows_of_rank = [results.get(timeout=900) for _ in processes]
        for process in processes:
            process.join()
    Console().print(report(rows_of_rank, total_bytes))


if __name__ == "__main__":
    main()
