"""Token streaming from a real S3 server: ours beside mosaicml-streaming and litdata, in one run.

python -m bench.data --peers DIR [--folder DIR] [--parts cold warm ...] [--rounds 3]

DIR is a virtual environment of the peers' own, because their requirements are not ours:
python3.11 -m venv DIR && DIR/bin/pip install torch==2.13.0 litdata==0.2.76 mosaicml-streaming==0.13.0 obstore
Without it, or without one of them, the others are measured.

Every reader runs in a process of its own (so CPU seconds and peak memory are its own), in rotating order, on the same
tokens. The floor is a GET of every shard and its decoding, in order, without making samples.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bench import streamers

BUCKET = "data"
READERS = ("floor", "ours", "ours_no_disk", "ours_batches", "litdata", "mosaic")
PEERS = {"litdata": "litdata", "mosaic": "streaming"}
"""Reader -> what it imports."""
PARTS = ("cold", "warm", "resume50", "resume99", "workers1", "workers2", "check", "flipped")
TOUCHED_BYTES = 1 << 30
"""More than any reader takes, page cache included."""
WITHOUT_CACHE = ("floor", "ours_no_disk", "ours_batches")


class Bench:
    """Runs readers against a server that is up.

    Args:
        peers: environment of the peers.
        folder: for caches.
        tokens: an epoch ends after so many when it is timed.
    """

    def __init__(self, peers: Path | None, folder: Path, tokens: int) -> None:
        self._peers = peers
        self._tokens = tokens
        self._folder = folder
        self._truth = folder / "truth.npy"
        self.readers = [reader for reader in READERS if self._is_there(reader)]
        self._caches: list[Path] = []
        self._filled: dict[str, Path] = {}
        self.results: dict[tuple[str, str], list[dict[str, Any]]] = {}

    def write(self) -> None:
        """Every format's files, where they are not there yet."""
        for reader in ("truth", "ours", *PEERS):
            marker = self._folder / f"written-{reader}"
            if marker.exists() or (reader in PEERS and reader not in self.readers):
                continue
            started = time.perf_counter()
            target = str(self._truth) if reader == "truth" else location_of(reader)
            done = self._child(reader, "write", reader, target)
            if done.returncode:
                sys.exit(f"{reader} could not be written:\n{done.stderr[-2000:]}")
            marker.touch()
            print(f"{reader} written in {time.perf_counter() - started:.0f} s", flush=True)

    def measure(self, reader: str, part: str) -> None:
        """One part of one reader, with the cache that the part is about."""
        is_cached = reader not in WITHOUT_CACHE
        if part in ("resume50", "resume99"):
            cache = self._new_cache(reader)
            self._read(reader, part, part, cache)
            if is_cached:
                self._read(reader, part, f"{part}_warm", cache)
        elif part == "cold" or (part.startswith("workers") and reader not in ("floor", "ours_batches")):
            cache = self._new_cache(reader)
            self._read(reader, part, part, cache)
            if part == "cold":
                self._filled[reader] = cache
        elif part == "warm" and is_cached:
            # What `cold` left, else what a look at an epoch leaves.
            if reader not in self._filled:
                self._filled[reader] = self._new_cache(reader)
                self._read(reader, part, "filling", self._filled[reader])
            self._read(reader, part, part, self._filled[reader])
        elif part == "check" and reader != "floor":
            self._read(reader, part, part, self._new_cache(reader))
        elif part == "flipped" and reader in ("ours", *PEERS):
            with one_flipped_bit(location_of(reader)):
                self._read(reader, part, part, self._new_cache(reader))

    def remove_caches(self) -> None:
        """Delete what readers cached."""
        for cache in self._caches:
            shutil.rmtree(cache, ignore_errors=True)

    def _new_cache(self, reader: str) -> Path:
        """An empty cache. None is deleted before the end: for a while after, ext4 makes files five times slower."""
        self._caches.append(Path(tempfile.mkdtemp(prefix=f"cache-{reader}-", dir=self._folder)))
        return self._caches[-1]

    def _read(self, reader: str, part: str, label: str, cache: Path) -> None:
        touch_memory()
        done = self._child(reader, "read", reader, location_of(reader), part, str(cache), str(self._truth))
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            print(f"{reader} {label}: failed ({done.returncode})\n{done.stderr[-1500:]}", file=sys.stderr)
            return
        result = json.loads(lines[-1].removeprefix("RESULT "))
        self.results.setdefault((reader, label), []).append(result)
        print(
            reader,
            label,
            {key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()},
            flush=True,
        )

    def _child(self, reader: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `bench.streamers` in the environment of a reader."""
        environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "BENCH_TOKENS": str(self._tokens)}
        command = [self._python(reader), "-m", "bench.streamers", *arguments]
        root = Path(__file__).parents[1]
        try:
            return subprocess.run(
                command, env=environment, cwd=root, capture_output=True, text=True, check=False, timeout=400
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, 124, "", "no end after 400 s")

    def _python(self, reader: str) -> str:
        return str(self._peers / "bin/python") if reader in PEERS else sys.executable

    def _is_there(self, reader: str) -> bool:
        if reader not in PEERS:
            return True
        if self._peers is not None:
            imports = f"from bench import streamers; streamers.stand_in_for_torchvision(); import {PEERS[reader]}"
            probe = [self._python(reader), "-c", imports]
            done = subprocess.run(probe, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
            if not done.returncode:
                return True
            print(f"{reader} is left out, it cannot be imported: {done.stderr.strip().splitlines()[-1]}")
        else:
            print(f"{reader} is left out: give --peers")
        return False


def touch_memory() -> None:
    """Make the host of a virtual machine back memory that is free.

    Some take back what is not used and give it again at 10 us a page, which is up to half of what a reader costs, comes
    and goes with what else ran before, and is none of the reader's.
    """
    np.zeros(TOUCHED_BYTES, np.uint8)[:: mmap.PAGESIZE] = 1


def location_of(reader: str) -> str:
    """Where the dataset of a reader is."""
    return f"s3://{BUCKET}/bench/{reader if reader in PEERS else 'ours'}"


@contextmanager
def one_flipped_bit(location: str) -> Iterator[None]:
    """The third of the large objects has one bit changed in its middle."""
    import obstore

    store = streamers.s3_store(location)
    entries = sorted(
        (entry["path"], entry["size"]) for batch in obstore.list(store) for entry in batch if entry["size"] > 8 << 20
    )
    name = entries[2][0]
    content = bytes(obstore.get(store, name).bytes())
    damaged = bytearray(content)
    damaged[len(damaged) // 2] ^= 1
    obstore.put(store, name, bytes(damaged))
    try:
        yield
    finally:
        obstore.put(store, name, content)


def stored_bytes(location: str) -> int:
    """Bytes of all objects of a dataset."""
    import obstore

    return sum(entry["size"] for batch in obstore.list(streamers.s3_store(location)) for entry in batch)


def table(bench: Bench) -> str:
    """Medians over the rounds, in Markdown."""

    def median(reader: str, part: str, name: str) -> float:
        values = [result[name] for result in bench.results.get((reader, part), []) if name in result]
        return statistics.median(values) if values else float("nan")

    def rate(reader: str, part: str) -> str:
        return f"{median(reader, part, 'tokens') / 1e6 / median(reader, part, 'seconds'):.1f}"

    def cpu(reader: str, part: str) -> str:
        return f"{median(reader, part, 'cpu_seconds') / median(reader, part, 'tokens') * 1e6:.4f}"

    def over_floor(reader: str, part: str) -> str:
        """Against the floor of the same round: what else the machine does changes from round to round."""
        spent, floors = (
            [result["cpu_seconds"] / result["tokens"] for result in bench.results.get(key, [])]
            for key in ((reader, part), ("floor", "cold"))
        )
        ratios = [own / floor for own, floor in zip(spent, floors, strict=False)]
        return f"{statistics.median(ratios):.2f}" if ratios else "-"

    def first(reader: str, part: str) -> str:
        return f"{median(reader, part, 'first_seconds'):.3f}"

    columns = {
        "M tokens/s cold": lambda reader: rate(reader, "cold"),
        "warm": lambda reader: rate(reader, "warm"),
        "CPU-s/M tokens cold": lambda reader: cpu(reader, "cold"),
        "warm ": lambda reader: cpu(reader, "warm"),
        "over the floor, cold": lambda reader: over_floor(reader, "cold"),
        "over the floor, warm": lambda reader: over_floor(reader, "warm"),
        "1 worker": lambda reader: f"{rate(reader, 'workers1')} at {cpu(reader, 'workers1')}",
        "2 workers": lambda reader: f"{rate(reader, 'workers2')} at {cpu(reader, 'workers2')}",
        "first batch s": lambda reader: first(reader, "cold"),
        "resume 50 % cold / warm": lambda reader: f"{first(reader, 'resume50')} / {first(reader, 'resume50_warm')}",
        "99 %": lambda reader: f"{first(reader, 'resume99')} / {first(reader, 'resume99_warm')}",
        "peak MiB": lambda reader: f"{median(reader, 'cold', 'peak_mib'):.0f}",
        "neighbour distance": lambda reader: f"{median(reader, 'check', 'neighbour_distance'):.3f}",
        "stored bytes a token": lambda reader: f"{stored_bytes(location_of(reader)) / 24 / streamers.CHUNK:.2f}",
    }
    lines = ["| | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for reader in bench.readers:
        cells = [cell(reader) for cell in columns.values()]
        lines.append(f"| {reader} | " + " | ".join(cells) + " |")
    for (reader, part), results in bench.results.items():
        if part in ("check", "flipped"):
            lines.append(f"{reader}, {part}: " + ", ".join(f"{key} {value}" for key, value in results[-1].items()))
    needed = stored_bytes(location_of("ours"))
    for reader in ("ours", "ours_no_disk"):
        lines.append(f"{reader}: {median(reader, 'cold', 'bytes_read') / needed:.3f} bytes read over all bytes stored")
    return "\n".join(lines)


def main() -> None:
    """Write, then read in rounds, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="virtual environment of the peers")
    parser.add_argument("--folder", type=Path, help="keeps what is written, for another call")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--readers", nargs="*", choices=READERS, default=READERS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=10**9, help="time no more of an epoch than this")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import servers

    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.folder or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        with servers.seaweedfs(folder / "weed") as endpoint:
            os.environ.update(
                AWS_ENDPOINT_URL=endpoint,
                S3_ENDPOINT_URL=endpoint,
                AWS_ACCESS_KEY_ID=servers.ACCESS_KEY,
                AWS_SECRET_ACCESS_KEY=servers.SECRET_KEY,
                AWS_REGION="us-east-1",
                AWS_DEFAULT_REGION="us-east-1",
            )
            bench = Bench(options.peers, folder, options.tokens)
            bench.readers = [reader for reader in bench.readers if reader in options.readers]
            bench.write()
            for number in range(options.rounds):
                turn = number % len(bench.readers)
                for part in options.parts:
                    for reader in bench.readers[turn:] + bench.readers[:turn]:
                        bench.measure(reader, part)
                print(f"round {number + 1} of {options.rounds}", flush=True)
            bench.remove_caches()
            print(table(bench))
            record = [{"reader": reader, "label": label, **each} for (reader, label), results in bench.results.items()
                      for each in results]  # fmt: skip
            (folder / "results.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
