"""Token streaming from a real S3 server: ours beside mosaicml-streaming and litdata, in one run.

python -m bench.data --peers DIR     DIR holds two virtual environments, `mosaic` and `lit`, with one peer each

Every reader runs in a process of its own (so CPU seconds and peak memory are its own), in rotating order, on the same
tokens. The floor is a GET of every shard and its decoding, in order, without making samples.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

NUM_TOKENS = 50_000_000
LENGTH = 2048
SHARD_BYTES = 32 << 20
BATCH = 32
BUCKET = "data"
READERS = ("floor", "ours", "ours_batches", "litdata", "mosaic")
PARTS = ("epoch", "warm", "resume50", "resume99")


def tokens_of(shard: int, count: int) -> np.ndarray:
    """The same skewed tokens for everybody: 16 bits each, compressing to about half."""
    return (np.random.default_rng(shard).zipf(1.3, count) % 50_000 + 1).astype(np.uint16)


def windows() -> Iterator[np.ndarray]:
    """All samples, for writers that store samples; LENGTH + 1 tokens, the last one the first of the next."""
    size = LENGTH * 2048
    carried: np.ndarray | None = None
    for shard in range(-(-NUM_TOKENS // size)):
        tokens = tokens_of(shard, size)
        if carried is not None:
            tokens = np.concatenate([carried, tokens])
        for start in range(0, len(tokens) - LENGTH, LENGTH):
            yield tokens[start : start + LENGTH + 1]
        carried = tokens[(len(tokens) - 1) // LENGTH * LENGTH :]


def num_samples() -> int:
    """Samples everybody serves, about."""
    return NUM_TOKENS // LENGTH


# Writers, each run in the environment of its reader.


def write_ours(location: str) -> None:
    """Our dataset."""
    from data.storage import Store
    from data.writer import DatasetFacts, DatasetWriter

    facts = DatasetFacts(
        tokenizer_sha256="bench",
        vocab_size=50_001,
        end_of_text_id=0,
        held_out_fraction=0.1,
        shard_blocks=SHARD_BYTES // 2 // (1 << 18),
    )
    writer = DatasetWriter(Store.open(location), facts)
    size = LENGTH * 2048
    for shard in range(-(-NUM_TOKENS // size)):
        writer.add("train", f"doc{shard}", "bench", tokens_of(shard, size)[: size - 1])
    writer.add("held_out", "other", "bench", np.arange(1, 20))
    writer.finish(num_duplicates=0, inputs=[])


def write_mosaic(location: str) -> None:
    """mosaicml-streaming's, with hashes, which are then checked."""
    stand_in_for_torchvision()
    from streaming import MDSWriter

    columns = {"tokens": f"ndarray:uint16:{LENGTH + 1}"}
    with MDSWriter(
        out=location, columns=columns, hashes=["xxh3_64"], size_limit=SHARD_BYTES, progress_bar=False
    ) as out:
        for window in windows():
            out.write({"tokens": window})


def write_litdata(location: str) -> None:
    """Litdata's binary writer and item loader for tokens, written locally and copied up."""
    import boto3
    from litdata.streaming.writer import BinaryWriter

    with tempfile.TemporaryDirectory() as folder:
        writer = BinaryWriter(folder, chunk_bytes=SHARD_BYTES)
        for index, window in enumerate(windows()):
            writer[index] = {"tokens": window}
        writer.done()
        writer.merge()
        client = boto3.client("s3")
        bucket, prefix = location.removeprefix("s3://").split("/", 1)
        for path in Path(folder).iterdir():
            if path.is_file():
                client.upload_file(str(path), bucket, f"{prefix}/{path.name}")


# Readers: an object with `sample_at(position)` order where it has one, iterators of token arrays.


def read_floor(location: str, part: str, cache: str) -> Iterator[np.ndarray]:
    """Whole shards and their decoding, no samples, no hashes."""
    from concurrent.futures import ThreadPoolExecutor

    import obstore
    import pyarrow as pa

    from data.storage import Store

    pa.set_cpu_count(1)
    store = Store.open(location)
    client = store._backend._opened()  # type: ignore[attr-defined]
    paths = sorted(store.sizes("train/shards"))
    with ThreadPoolExecutor(2) as pool:
        for content in pool.map(lambda path: obstore.get(client, path).bytes(), paths):
            file = pa.ipc.open_file(pa.py_buffer(memoryview(content)))
            for number in range(file.num_record_batches):
                yield file.get_batch(number).column(0).to_numpy()


def our_stream(location: str, cache: str) -> Any:
    """Our stream over one source, every block hashed; a disk tier where `cache` is given."""
    from conf.schema import DiskTierConfig, ShuffleConfig
    from data.shards import Access, Dataset
    from data.stream import Stream, StreamSpec
    from data.tiers import open_tiers

    tiers = [DiskTierConfig(kind="disk", path=cache, num_bytes=8 << 30)] if cache else []
    dataset = Dataset.open(location, Access(tiers=open_tiers(tiers)))
    spec = StreamSpec(
        mixtures=[(0, {"bench": 1.0})],
        seed=1,
        sequence_length=LENGTH,
        global_batch=BATCH,
        micro_batch=BATCH,
        shuffle=ShuffleConfig(lanes=4, window_blocks=32),
    )
    return Stream({"bench": dataset}, spec)


def read_ours(location: str, part: str, cache: str) -> Iterator[np.ndarray]:
    """Samples as arrays of 16-bit tokens, what the peers give."""
    stream = our_stream(location, cache)
    steps = stream.samples_in_epoch("bench") // BATCH
    for step in range(first_of(part, steps), steps):
        yield from stream.rows(step, 0, BATCH)
    report(bytes_read=stream._sources[0].dataset.store.counters.bytes_read)


def read_ours_batches(location: str, part: str, cache: str) -> Iterator[np.ndarray]:
    """Whole batches for training: 64-bit tokens, labels, masks, positions."""
    stream = our_stream(location, cache)
    steps = stream.samples_in_epoch("bench") // BATCH
    for step in range(first_of(part, steps), steps):
        for batch in stream.batches(step, 0, 1):
            yield from batch.tokens_BS


def read_mosaic(location: str, part: str, cache: str) -> Iterator[np.ndarray]:
    """mosaicml-streaming with its default shuffle, hashes checked."""
    stand_in_for_torchvision()
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    dataset = StreamingDataset(
        remote=location, local=cache, shuffle=True, batch_size=BATCH, validate_hash="xxh3_64", num_canonical_nodes=1
    )
    size = dataset.size // BATCH * BATCH
    if part.startswith("resume"):
        dataset.load_state_dict(
            {
                "epoch": 0,
                "sample_in_epoch": first_of(part, size // BATCH) * BATCH,
                "num_canonical_nodes": 1,
                "shuffle_seed": dataset.shuffle_seed,
                "initial_physical_nodes": 1,
            }
        )
    for sample in dataset:
        yield sample["tokens"]


def read_litdata(location: str, part: str, cache: str) -> Iterator[np.ndarray]:
    """Litdata with its shuffle, plain items."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import downloader

    # The only way to let it speak plain http to an S3 of one's own.
    downloader._OBSTORE_CLIENT_OPTIONS = {**downloader._OBSTORE_CLIENT_OPTIONS, "allow_http": True}
    options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"], "region_name": "us-east-1"}
    dataset = StreamingDataset(location, cache_dir=cache, shuffle=True, drop_last=False, storage_options=options)
    if part.startswith("resume"):
        loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0)
        steps = len(loader)
        state = {
            "dataset": dataset.state_dict(first_of(part, steps) * BATCH, 0, BATCH),
            "current_epoch": 1,
            "latest_worker_idx": 0,
            "num_samples_yielded": first_of(part, steps) * BATCH,
        }
        loader.load_state_dict(state)
        for batch in loader:
            yield from np.asarray(batch["tokens"])
        return
    for sample in dataset:
        yield sample["tokens"]


def stand_in_for_torchvision() -> None:
    """mosaicml-streaming imports torchvision for its image datasets; here are none, and builds may not fit torch's."""
    from importlib.machinery import ModuleSpec
    from unittest.mock import MagicMock

    for name in ("", ".datasets", ".transforms", ".transforms.functional", ".io"):
        sys.modules[f"torchvision{name}"] = MagicMock(
            VisionDataset=object, __spec__=ModuleSpec(f"torchvision{name}", None), __path__=[], __version__="0"
        )


def first_of(part: str, steps: int) -> int:
    """The step at which a part of an epoch begins."""
    return {"resume50": steps // 2, "resume99": steps * 99 // 100}.get(part, 0)


_reported: dict[str, float] = {}


def report(**values: float) -> None:
    """A reader's own numbers."""
    _reported.update(values)


def measure(reader: str, location: str, part: str, cache: str) -> None:
    """Read a part of an epoch in this process and print what it took."""
    read = globals()[f"read_{reader}"]
    # Imports are paid once a job and are not what is compared.
    for module in ("obstore", "pyarrow", "botocore.session", "data.stream", "torch", "litdata"):
        try:
            __import__(module)
        except ImportError:
            continue
    cpu, started = time.process_time(), time.perf_counter()
    first, tokens = 0.0, 0
    keys: list[int] = []
    for window in read(location, part, cache):
        if not tokens:
            first = time.perf_counter() - started
            if part.startswith("resume"):
                tokens = 1
                break
        tokens += len(window) if reader == "floor" else LENGTH
        if reader not in ("floor", "ours_batches"):
            keys.append(hash(window[:16].tobytes()))
    result = {
        "reader": reader,
        "part": part,
        "first_seconds": first,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "tokens": tokens,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        **_reported,
    }
    if keys and part == "epoch":
        places = {hash(window[:16].tobytes()): place for place, window in enumerate(windows())}
        order = np.array([places.get(key, -1) for key in keys])
        found = order[order >= 0]
        result["neighbour_distance"] = float(np.abs(np.diff(found)).mean() / (len(found) / 3))
        result["distinct"] = len(np.unique(found)) / len(keys)
    print("RESULT " + json.dumps(result))
    sys.stdout.flush()
    os._exit(0)


def python_of(reader: str, peers: Path) -> str:
    """The interpreter a reader runs in."""
    return {"mosaic": str(peers / "mosaic/bin/python"), "litdata": str(peers / "lit/bin/python")}.get(
        reader, sys.executable
    )


def location_of(reader: str) -> str:
    """Where the dataset of a reader is."""
    return f"s3://{BUCKET}/bench/{reader if reader in ('mosaic', 'litdata') else 'ours'}"


def run_child(reader: str, peers: Path, *arguments: str) -> dict[str, Any] | None:
    """Run this file in a process and read its result."""
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONHASHSEED": "0"}
    command = [python_of(reader, peers), "-m", "bench.data", *arguments]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return result
    if done.returncode or arguments[0] == "read":
        print(f"{reader} {' '.join(arguments)}: failed\n{done.stderr[-1500:]}", file=sys.stderr)
    return None


def main() -> None:
    """Write, then read in rounds, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import servers

    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder, servers.seaweedfs(Path(folder) / "weed") as endpoint:
        os.environ.update(
            AWS_ENDPOINT_URL=endpoint,
            S3_ENDPOINT_URL=endpoint,
            AWS_ACCESS_KEY_ID=servers.ACCESS_KEY,
            AWS_SECRET_ACCESS_KEY=servers.SECRET_KEY,
            AWS_REGION="us-east-1",
            AWS_DEFAULT_REGION="us-east-1",
        )
        for reader in ("ours", "litdata", "mosaic"):
            started = time.perf_counter()
            run_child(reader, options.peers, "write", reader, location_of(reader))
            print(f"{reader} written in {time.perf_counter() - started:.0f} s", flush=True)
        for number in range(options.rounds):
            readers = READERS[number % len(READERS) :] + READERS[: number % len(READERS)]
            for reader in readers:
                cache = Path(folder) / f"cache-{reader}"
                for part in PARTS:
                    if part != "warm":
                        shutil.rmtree(cache, ignore_errors=True)
                    if reader == "floor" and part != "epoch":
                        continue
                    with_cache = "" if reader.startswith("ours") and part == "epoch" else str(cache)
                    if part == "warm":
                        run_child(reader, options.peers, "read", reader, location_of(reader), "epoch", str(cache))
                    result = run_child(reader, options.peers, "read", reader, location_of(reader), part, with_cache)
                    if result is not None:
                        results.setdefault((reader, part), []).append(result)
            print(f"round {number + 1} of {options.rounds}", flush=True)
    print_table(results)


def print_table(results: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    """Medians over the rounds."""

    def median(reader: str, part: str, name: str) -> float:
        values = [result[name] for result in results.get((reader, part), []) if name in result]
        return statistics.median(values) if values else float("nan")

    def per_million(reader: str, part: str) -> float:
        values = [result["cpu_seconds"] / result["tokens"] * 1e6 for result in results.get((reader, part), [])]
        return statistics.median(values) if values else float("nan")

    print("| | Mtokens/s cold | CPU-s/Mtoken cold | warm | first batch s | resume 50 % | 99 % | distance | MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for reader in READERS:
        rate = median(reader, "epoch", "tokens") / median(reader, "epoch", "seconds") / 1e6
        cells = [
            f"{rate:.1f}",
            f"{per_million(reader, 'epoch'):.4f}",
            f"{per_million(reader, 'warm'):.4f}",
            *(f"{median(reader, part, 'first_seconds'):.3f}" for part in ("epoch", "resume50", "resume99")),
            f"{median(reader, 'epoch', 'neighbour_distance'):.3f}",
            f"{median(reader, 'epoch', 'peak_mib'):.0f}",
        ]
        print(f"| {reader} | " + " | ".join(cells) + " |")
    needed = 2 * NUM_TOKENS
    print(f"ours: {median('ours', 'epoch', 'bytes_read') / needed:.3f} bytes read over bytes of tokens (compressed)")
    print(json.dumps([result for group in results.values() for result in group]), file=sys.stderr)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["write", reader, location]:
            globals()[f"write_{reader}"](location)
        case ["read", reader, location, part, cache]:
            measure(reader, location, part, cache)
        case _:
            main()
