"""What `bench/data.py` compares: the same tokens written and read by us, mosaicml-streaming and litdata.

Run in processes of their own, ours in this environment and the peers in theirs:
python -m bench.streamers write|read READER LOCATION ...
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

LENGTH = 2048
SHARD_BYTES = 32 << 20
BATCH = 32
VOCABULARY = 50_001
CHUNK = LENGTH * 2048
TIMED_TOKENS = int(os.environ.get("BENCH_TOKENS", 10**9))
NUM_CHUNKS = 24
"""100.7M tokens: whole windows of our shuffle, so that a pass can be told from the next when samples are checked."""


def tokens_of(chunk: int) -> np.ndarray:
    """The same skewed tokens for everybody: 16 bits each, compressing to about half; the last ends a document."""
    tokens = (np.random.default_rng(chunk).zipf(1.3, CHUNK) % (VOCABULARY - 1) + 1).astype(np.uint16)
    tokens[-1] = 0
    return tokens


def windows() -> Iterator[np.ndarray]:
    """All samples in order: LENGTH + 1 tokens, the last one the first of the next."""
    tokens = tokens_of(0)
    for chunk in range(NUM_CHUNKS):
        following = tokens_of(chunk + 1) if chunk + 1 < NUM_CHUNKS else np.zeros(1, np.uint16)
        tokens = np.concatenate([tokens, following[:1]])
        for start in range(0, CHUNK, LENGTH):
            yield tokens[start : start + LENGTH + 1]
        tokens = following


def digest(window: np.ndarray) -> int:
    """What a sample is recognised by."""
    return int.from_bytes(hashlib.blake2b(window.tobytes(), digest_size=8).digest(), "little")


# Writers.


def write_ours(location: str) -> None:
    """Our dataset: each chunk a document."""
    from data.storage import Store
    from data.writer import BLOCK_TOKENS, DatasetFacts, DatasetWriter

    facts = DatasetFacts(
        tokenizer_sha256="bench",
        vocab_size=VOCABULARY,
        end_of_text_id=0,
        held_out_fraction=0.1,
        shard_blocks=SHARD_BYTES // 2 // BLOCK_TOKENS,
    )
    writer = DatasetWriter(Store.open(location), facts)
    for chunk in range(NUM_CHUNKS):
        writer.add("train", f"document{chunk}", "bench", tokens_of(chunk)[:-1])
    writer.add("train", "end", "bench", np.empty(0, np.uint16))
    writer.add("held_out", "other", "bench", np.arange(1, 20))
    writer.finish(num_duplicates=0, inputs=[])


def write_mosaic(location: str) -> None:
    """mosaicml-streaming's shards, with hashes that are checked when reading."""
    stand_in_for_torchvision()
    from streaming import MDSWriter

    columns = {"tokens": f"ndarray:uint16:{LENGTH + 1}"}
    settings: dict[str, Any] = {"hashes": ["xxh3_64"], "size_limit": SHARD_BYTES, "progress_bar": False}
    with MDSWriter(out=location, columns=columns, **settings) as writer:
        for window in windows():
            writer.write({"tokens": window})


def write_litdata(location: str) -> None:
    """Litdata's chunks, written locally and copied up."""
    import obstore
    from litdata.streaming.writer import BinaryWriter

    with tempfile.TemporaryDirectory() as folder:
        writer = BinaryWriter(folder, chunk_bytes=SHARD_BYTES)
        for index, window in enumerate(windows()):
            writer[index] = {"tokens": window}
        writer.done()
        writer.merge()
        store = s3_store(location)
        for path in Path(folder).iterdir():
            if path.is_file():
                obstore.put(store, path.name, path)


def s3_store(location: str) -> Any:
    """An obstore client of the bench's server."""
    from obstore.store import from_url

    endpoint = os.environ["AWS_ENDPOINT_URL"]
    return from_url(location, endpoint=endpoint, region="us-east-1", client_options={"allow_http": True})


# Readers: iterators over arrays of tokens, one sample or a batch of them.


def read_floor(location: str, first: float, cache: str) -> Iterator[np.ndarray]:
    """Whole shards and their decoding in order: no samples, no hashes."""
    from concurrent.futures import ThreadPoolExecutor

    import obstore
    import pyarrow as pa

    from data.tables import numbers

    pa.set_cpu_count(1)
    store = s3_store(location)
    paths = sorted(entry["path"] for batch in obstore.list(store, "train/shards") for entry in batch)
    with ThreadPoolExecutor(2) as pool:
        for content in pool.map(lambda path: obstore.get(store, path).bytes(), paths):
            file = pa.ipc.open_file(pa.py_buffer(memoryview(content)))
            for number in range(file.num_record_batches):
                yield numbers(file.get_batch(number).column(0))[: 1 << 18]


def our_stream(location: str, cache: str) -> Any:
    """Our stream over one source, every block hashed; a disk tier where `cache` is given."""
    from conf.schema import DiskTierConfig, ShuffleConfig
    from data.samples import StreamSpec
    from data.shards import Access, Dataset
    from data.stream import Stream
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


def read_ours(location: str, first: float, cache: str) -> Iterator[np.ndarray]:
    """Samples as 16-bit tokens, what the peers give."""
    stream = our_stream(location, cache)
    steps = stream.samples_in_epoch("bench") // BATCH
    try:
        for step in range(int(steps * first), steps):
            yield stream.rows(step, 0, BATCH)
    finally:
        storage, _ = stream.counters()
        report(bytes_read=storage["bytes"], requests=storage["requests"])


def read_ours_no_disk(location: str, first: float, cache: str) -> Iterator[np.ndarray]:
    """The same, straight from storage into memory."""
    return read_ours(location, first, "")


def read_ours_batches(location: str, first: float, cache: str) -> Iterator[np.ndarray]:
    """Whole batches for training: 64-bit tokens, labels, masks, positions."""
    stream = our_stream(location, "")
    steps = stream.samples_in_epoch("bench") // BATCH
    for step in range(int(steps * first), steps):
        for batch in stream.batches(step, 0, 1):
            yield batch.tokens_BS


def mosaic_dataset(location: str, cache: str) -> Any:
    """mosaicml-streaming with its default shuffle, hashes checked."""
    stand_in_for_torchvision()
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    settings: dict[str, Any] = {"validate_hash": "xxh3_64", "num_canonical_nodes": 1}
    return StreamingDataset(remote=location, local=cache, shuffle=True, batch_size=BATCH, **settings)


def read_mosaic(location: str, first: float, cache: str) -> Iterator[np.ndarray]:
    """Samples in its order, from a place of its epoch."""
    dataset = mosaic_dataset(location, cache)
    if first:
        state = {
            "epoch": 0,
            "sample_in_epoch": int(dataset.size // BATCH * first) * BATCH,
            "num_canonical_nodes": 1,
            "shuffle_seed": dataset.shuffle_seed,
            "initial_physical_nodes": 1,
        }
        dataset.load_state_dict(state)
    for sample in dataset:
        yield sample["tokens"]


def stand_in_for_torchvision() -> None:
    """mosaicml-streaming imports torchvision for image datasets; here are none, and its builds may not fit torch's."""
    from importlib.machinery import ModuleSpec
    from unittest.mock import MagicMock

    for name in ("", ".datasets", ".transforms", ".transforms.functional", ".io"):
        sys.modules[f"torchvision{name}"] = MagicMock(
            VisionDataset=object, __spec__=ModuleSpec(f"torchvision{name}", None), __path__=[], __version__="0"
        )


def litdata_dataset(location: str, cache: str) -> Any:
    """Litdata with its shuffle and plain items."""
    from litdata import StreamingDataset
    from litdata.streaming import downloader

    # The only way to let it speak plain http to an S3 of one's own.
    downloader._OBSTORE_CLIENT_OPTIONS = {**downloader._OBSTORE_CLIENT_OPTIONS, "allow_http": True}
    options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"], "region_name": "us-east-1"}
    return StreamingDataset(location, cache_dir=cache, shuffle=True, drop_last=False, storage_options=options)


def read_litdata(location: str, first: float, cache: str) -> Iterator[np.ndarray]:
    """Samples in its order; it resumes through its loader."""
    from litdata import StreamingDataLoader

    dataset = litdata_dataset(location, cache)
    if not first:
        for sample in dataset:
            yield sample["tokens"]
        return
    loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0)
    done = int(len(loader) * first) * BATCH
    state = {
        "dataset": dataset.state_dict(done, 0, BATCH),
        "current_epoch": 1,
        "latest_worker_idx": 0,
        "num_samples_yielded": done,
    }
    loader.load_state_dict(state)
    for batch in loader:
        yield np.asarray(batch["tokens"])


def loader_of(reader: str, location: str, cache: str, num_workers: int) -> Any:
    """Batches through torch's DataLoader and its worker processes."""
    from torch.utils.data import DataLoader

    if reader == "mosaic":
        return DataLoader(mosaic_dataset(location, cache), batch_size=BATCH, num_workers=num_workers)
    if reader == "litdata":
        from litdata import StreamingDataLoader

        return StreamingDataLoader(litdata_dataset(location, cache), batch_size=BATCH, num_workers=num_workers)
    from torch.utils.data import IterableDataset, get_worker_info

    class Rows(IterableDataset):  # type: ignore[type-arg]
        """A worker reads as a data rank does: its share of every global batch."""

        def __iter__(self) -> Iterator[np.ndarray]:
            stream, worker = our_stream(location, cache), get_worker_info()
            assert worker is not None
            share = BATCH // worker.num_workers
            for step in range(stream.samples_in_epoch("bench") // BATCH):
                yield stream.rows(step, worker.id * share, share)

    # As many rows a transfer as the others.
    return DataLoader(Rows(), batch_size=None, num_workers=num_workers)


_reported: dict[str, float] = {}


def report(**values: float) -> None:
    """A reader's own numbers."""
    _reported.update(values)


def cpu_seconds() -> float:
    """User and system time of this process and of its workers that ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_mib() -> float:
    """Most memory this process had; getrusage would tell of the process that started it, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def measure(reader: str, location: str, part: str, cache: str) -> dict[str, float | str]:
    """Read an epoch, or the first batch from a place of it: seconds and CPU seconds."""
    # Imports are paid once a job and are not what is compared.
    if reader == "mosaic":
        stand_in_for_torchvision()
    own = {"litdata": ["torch", "litdata"], "mosaic": ["torch", "streaming"]}
    modules = own.get(reader, ["obstore", "pyarrow", "botocore.session", "data.stream"])
    for module in ["torch", *modules] if part.startswith("workers") else modules:
        __import__(module)
    import_seconds = cpu_seconds()
    cpu, started = cpu_seconds(), time.perf_counter()
    if part.startswith("workers"):
        loader = loader_of(reader, location, cache, int(part[-1]))
        counts = (len(batch["tokens"] if isinstance(batch, dict) else batch) for batch in loader)
    else:
        place = {"resume50": 0.5, "resume99": 0.99}.get(part.partition("_")[0], 0.0)
        arrays = globals()[f"read_{reader}"](location, place, cache)
        counts = (array.size if reader == "floor" else array.size // LENGTH for array in arrays)
    first_seconds, first_cpu, samples = 0.0, 0.0, 0
    for count in counts:
        samples += count
        if not first_seconds and samples >= BATCH:
            first_seconds = time.perf_counter() - started
            first_cpu = cpu_seconds() - cpu
            if part.startswith("resume"):
                break
        if samples * (1 if reader == "floor" else LENGTH) >= TIMED_TOKENS:
            break
    del counts
    return {
        "first_seconds": first_seconds,
        "first_cpu_seconds": first_cpu,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": cpu_seconds() - cpu,
        "import_cpu_seconds": import_seconds,
        "tokens": samples if reader == "floor" else samples * LENGTH,
        "peak_mib": peak_mib(),
        **_reported,
    }


def check(reader: str, location: str, truth: str, cache: str) -> dict[str, float | str]:
    """Read an epoch and hold every sample against the truth; also tells how well it is shuffled."""
    places = {key: place for place, key in enumerate(np.load(truth).tolist())}
    order: list[int] = []
    error = ""
    try:
        for array in globals()[f"read_{reader}"](location, 0.0, cache):
            order += [places.get(digest(window), -1) for window in array.reshape(-1, LENGTH + 1)]
    except Exception as problem:  # whatever a peer raises is its answer
        error = f"{type(problem).__name__}: {problem}"[:200]
    found = np.array([place for place in order if place >= 0])
    return {
        "samples": len(order),
        "wrong": order.count(-1),
        "missing": len(places) - len(set(found.tolist())),
        "repeated": len(found) - len(set(found.tolist())),
        "neighbour_distance": float(np.abs(np.diff(found)).mean() / (len(places) / 3)) if len(found) > 1 else 0.0,
        "error": error,
    }


def main() -> None:
    """Do one thing and print what it took."""
    match sys.argv[1:]:
        case ["write", "truth", path]:
            np.save(path, np.array([digest(window) for window in windows()], np.uint64))
        case ["write", reader, location]:
            globals()[f"write_{reader}"](location)
        case ["read", reader, location, "check" | "flipped" as part, cache, truth]:
            print("RESULT " + json.dumps({"part": part, **check(reader, location, truth, cache)}))
        case ["read", reader, location, part, cache, _]:
            print("RESULT " + json.dumps({"part": part, **measure(reader, location, part, cache)}))
    sys.stdout.flush()
    # Peers leave threads behind that would keep the process.
    os._exit(0)


if __name__ == "__main__":
    main()
