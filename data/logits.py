"""A teacher's likeliest tokens, written down once and read like data: by sample id, every block held against its hash.

logits.json              the manifest, written last: a folder without it is not a recording
index/N.parquet          parts: a row for each of `PART_SAMPLES` samples, with the place and hash of its block
chunks/N-RANK.parquet    the same rows as the ranks wrote them: what a recording that was stopped goes on from
shards/N-RANK-M.arrow    Arrow IPC files like a dataset's shards, a record batch (block) a sample

Values are logarithms of probabilities at the recording's temperature: near 0 where it matters, which 16 bits hold well.

Shape suffixes: B samples, S tokens of a sample, K likeliest tokens.
"""

from __future__ import annotations

import hashlib
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from conf.errors import DataError
from data.blocks import BlockReader
from data.index import BlockRef, table_bytes
from data.shards import Access
from data.storage import MissingObjectError, Store
from data.writer import block_hashes, shard_bytes

FORMAT_VERSION = 1
MANIFEST_NAME = "logits.json"
SHARD_BYTES = 64 << 20
PART_SAMPLES = 1 << 16
READERS = 4

StoredAs = Literal["bf16", "fp16", "fp32"]
VALUE_TYPES: dict[StoredAs, tuple[pa.DataType, Any]] = {
    "bf16": (pa.uint16(), np.uint16),  # the upper half of a float32
    "fp16": (pa.float16(), np.float16),
    "fp32": (pa.float32(), np.float32),
}
ROWS_SCHEMA = pa.schema(
    [
        ("sample", pa.int64()),
        ("path", pa.string()),
        ("start", pa.int64()),
        ("num_bytes", pa.int64()),
        ("hash", pa.binary(16)),
    ]
)

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class Likeliest(NamedTuple):
    """A teacher's likeliest tokens of some samples.

    Attributes:
        ids_BSK: int64 tokens.
        log_probabilities_BSK: float32, natural logarithm.
    """

    ids_BSK: Ids
    log_probabilities_BSK: Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitsManifest:
    """What `logits.json` holds.

    Attributes:
        format_version: of the layout described at the top of this file.
        about: what the recording is of: everything that decides which samples there are and what the teacher says of
            them. A reader that expects anything else is refused.
        vocab_size: all ids are below it.
        tokens: of a sample.
        top_k: ids kept a token.
        stored_as: type of the values.
        num_samples: from sample 0 on.
        parts: sha256 of each part of the index.
    """

    format_version: int
    about: dict[str, Any]
    vocab_size: int
    tokens: int
    top_k: int
    stored_as: StoredAs
    num_samples: int
    parts: tuple[str, ...] = ()

    @property
    def schema(self) -> pa.Schema:
        """Columns of a block, which has one row."""
        size = self.tokens * self.top_k
        ids = pa.uint16() if self.vocab_size <= 1 << 16 else pa.uint32()
        values = VALUE_TYPES[self.stored_as][0]
        return pa.schema([("ids", pa.list_(ids, size)), ("values", pa.list_(values, size))])

    @property
    def sample_bytes(self) -> int:
        """Of a sample before compression."""
        bits: int = sum(field.type.value_type.bit_width for field in self.schema)
        return self.tokens * self.top_k * bits // 8


class LogitsWriter:
    """What one of the ranks that share a recording writes.

    A chunk is a run of samples; when all ranks have ended it, it need not be written again.

    Args:
        store: where to.
        manifest: of the whole recording, without its parts.
        rank: of this writer among those who write.
    """

    def __init__(self, store: Store, manifest: LogitsManifest, *, rank: int) -> None:
        self._store = store
        self._manifest = manifest
        self._rank = rank
        self._pending: list[tuple[int, pa.RecordBatch]] = []
        self._rows: list[dict[str, Any]] = []
        self._num_shards = 0

    def add(self, first_sample: int, likeliest: Likeliest, *, chunk: int) -> None:
        """Write down what was said of consecutive samples.

        Raises:
            ValueError: they are of another shape than the manifest says.
            DataError: a shard cannot be written.
        """
        manifest, shape = self._manifest, likeliest.ids_BSK.shape
        if shape[1:] != (manifest.tokens, manifest.top_k):
            raise ValueError(f"logits of shape {shape}, and the manifest has ({manifest.tokens}, {manifest.top_k})")
        for place, (ids_SK, values_SK) in enumerate(zip(*likeliest, strict=True)):
            self._pending.append((first_sample + place, block_of(ids_SK, values_SK, manifest)))
        if len(self._pending) * manifest.sample_bytes >= SHARD_BYTES:
            self._write_shard(chunk)

    def end_chunk(self, chunk: int) -> None:
        """Write what is open.

        Raises:
            DataError: it cannot be written.
        """
        if self._pending:
            self._write_shard(chunk)
        table = pa.Table.from_pylist(self._rows, schema=ROWS_SCHEMA)
        self._store.write(f"chunks/{chunk:08d}-{self._rank:05d}.parquet", table_bytes(table))
        self._rows, self._num_shards = [], 0

    def _write_shard(self, chunk: int) -> None:
        path = f"shards/{chunk:08d}-{self._rank:05d}-{self._num_shards:04d}.arrow"
        content, starts = shard_bytes([batch for _, batch in self._pending], self._manifest.schema)
        self._store.write(path, content)
        digests = block_hashes(content, starts)
        for place, (sample, _) in enumerate(self._pending):
            start = starts[place]
            row = {"sample": sample, "path": path, "start": start, "num_bytes": starts[place + 1] - start}
            self._rows.append(row | {"hash": digests[place]})
        self._pending = []
        self._num_shards += 1


def whole_chunks(store: Store, chunks: Mapping[int, range]) -> set[int]:
    """Chunks all of whose samples were written; what is there of others is forgotten, to be written anew.

    Args:
        store: of the recording.
        chunks: the samples of each.

    Raises:
        DataError: storage cannot be read or written.
    """
    names: dict[int, list[str]] = {}
    for name in _chunk_files(store):
        names.setdefault(int(name.removeprefix("chunks/").split("-")[0]), []).append(name)
    whole = set()
    for chunk, samples in chunks.items():
        if set(_rows_in(store, names.get(chunk, [])).column("sample").to_pylist()) == set(samples):
            whole.add(chunk)
        else:
            # Shards of one name may be of another mesh's ranks: rows about them must not outlive them.
            for name in names.get(chunk, []):
                store.delete(name)
    return whole


def finish(store: Store, manifest: LogitsManifest) -> LogitsManifest:
    """Write the index and the manifest, when all writers have ended all chunks.

    Raises:
        DataError: samples are missing.
    """
    rows = _rows_in(store, _chunk_files(store)).sort_by("sample")
    if not np.array_equal(rows.column("sample").to_numpy(), np.arange(manifest.num_samples)):
        raise DataError(f"{store.location}: {rows.num_rows} samples of {manifest.num_samples} were written.")
    parts = []
    for part, start in enumerate(range(0, rows.num_rows, PART_SAMPLES)):
        content = table_bytes(rows.slice(start, PART_SAMPLES).combine_chunks())
        store.write(_part_name(part), content)
        parts.append(hashlib.sha256(content).hexdigest())
    whole = LogitsManifest(**{**asdict(manifest), "parts": tuple(parts)})
    store.write(MANIFEST_NAME, (json.dumps(asdict(whole), indent=2) + "\n").encode())
    return whole


class LogitsReader(ABC):
    """What a teacher says, by sample; fetched by threads before it is asked for.

    Attributes:
        manifest: which samples there are, and in which form.
    """

    def __init__(self, manifest: LogitsManifest) -> None:
        self.manifest = manifest
        self._expected: dict[int, Future[tuple[Ids, Floats]]] = {}
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="logits")

    def expect(self, sample_ids: Iterable[int]) -> None:
        """Begin to fetch samples that will be asked for, once; those outside are passed over."""
        for sample in sample_ids:
            if 0 <= sample < self.manifest.num_samples and sample not in self._expected:
                self._expected[sample] = self._pool.submit(self._fetched, sample)

    def read(self, sample_ids: npt.NDArray[np.int64]) -> Likeliest:
        """What the teacher says of samples.

        Raises:
            DataError: it cannot be had, or is damaged.
            IndexError: a sample is outside of what there is.
        """
        if sample_ids.min() < 0 or sample_ids.max() >= self.manifest.num_samples:
            raise IndexError(f"samples {sample_ids.min()} to {sample_ids.max()} of {self.manifest.num_samples}")
        self.expect(sample_ids.tolist())
        ids, values = zip(*(self._expected.pop(sample).result() for sample in sample_ids.tolist()), strict=True)
        return Likeliest(np.stack(ids), np.stack(values))

    def close(self) -> None:
        """End the threads that fetch."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    @abstractmethod
    def _fetched(self, sample: int) -> tuple[Ids, Floats]:
        """Ids and values of one sample, of shape SK; called by several threads."""


class StoredLogits(LogitsReader):
    """A recording, open for reading.

    Attributes:
        store: where it is.
    """

    def __init__(self, store: Store, manifest: LogitsManifest, access: Access) -> None:
        super().__init__(manifest)
        self.store = store
        self._reader = BlockReader(store, access.tiers, access.archive.ask if access.archive else None)
        self._parts: dict[int, pa.Table] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, location: str, access: Access | None = None) -> StoredLogits:
        """Open a recording.

        Raises:
            DataError: there is none, or it is damaged.
        """
        access = access or Access()
        store = Store.open(location, access.storage)
        try:
            record = json.loads(bytes(store.read(MANIFEST_NAME)))
            if record["format_version"] != FORMAT_VERSION:
                raise DataError(f"{location}: format version {record['format_version']}, not {FORMAT_VERSION}.")
            manifest = LogitsManifest(**{**record, "parts": tuple(record["parts"])})
        except MissingObjectError:
            raise DataError(
                f"{location}: no recording of a teacher here (there is no {MANIFEST_NAME}; it is written last). "
                "Make one with a stage of kind logits."
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{location}: damaged {MANIFEST_NAME} ({error!r}). Record it anew.") from error
        return cls(store, manifest, access)

    def require(self, about: Mapping[str, Any], *, num_samples: int) -> None:
        """See to it that it is a recording of what is wanted, and long enough.

        Raises:
            DataError: names what differs.
        """
        wrong = differences(self.manifest.about, about)
        if wrong:
            raise DataError(
                f"{self.store.location}: recorded of something else, {'; '.join(wrong)}. What it says would be about "
                "other tokens. Record it anew for this stage, or ask the teacher itself (distillation.logits=null)."
            )
        if num_samples > self.manifest.num_samples:
            raise DataError(
                f"{self.store.location}: ends after {self.manifest.num_samples} samples, and the stage reads "
                f"{num_samples}. Record more, or train on fewer tokens."
            )

    def _ref(self, sample: int) -> BlockRef:
        number, row = divmod(sample, PART_SAMPLES)
        with self._lock:
            part = self._parts.get(number)
            if part is None:
                part = self._parts[number] = self._read_part(number)
        values = {name: part.column(name)[row].as_py() for name in ROWS_SCHEMA.names}
        return BlockRef(values["path"], values["start"], values["num_bytes"], values["hash"])

    def _read_part(self, number: int) -> pa.Table:
        name = _part_name(number)
        content = bytes(self.store.read(name))
        if hashlib.sha256(content).hexdigest() != self.manifest.parts[number]:
            raise DataError(f"{self.store.name_of(name)}: another sha256 than {MANIFEST_NAME} says. Copy it again.")
        return pq.read_table(pa.BufferReader(content), use_threads=False)

    def _fetched(self, sample: int) -> tuple[Ids, Floats]:
        ref = self._ref(sample)
        (content,) = self._reader.read([ref], ref.digest.hex())
        try:
            return said_in(pa.ipc.read_record_batch(pa.py_buffer(content), self.manifest.schema), self.manifest)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{self.store.name_of(ref.path)}: not a shard ({error}). Record it anew.") from error


def differences(have: Mapping[str, Any], want: Mapping[str, Any], *, known_only: bool = False) -> list[str]:
    """In which words what a recording is about differs from what is wanted; of what is wanted alone, if asked."""
    want = json.loads(json.dumps(want))
    return [
        f"{name} is {have.get(name)!r} and should be {want.get(name)!r}"
        for name in sorted(want if known_only else {*have, *want})
        if have.get(name) != want.get(name)
    ]


def block_of(ids_SK: Ids, log_probabilities_SK: Floats, manifest: LogitsManifest) -> pa.RecordBatch:
    """The block of one sample."""
    values: npt.NDArray[Any] = np.ascontiguousarray(log_probabilities_SK).reshape(-1)
    if manifest.stored_as == "bf16":
        bits = values.view(np.uint32)
        # To the nearest, ties to even.
        values = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    arrays = []
    for column, flat in zip(manifest.schema, (ids_SK.reshape(-1), values), strict=True):
        flat = flat.astype(column.type.value_type.to_pandas_dtype())
        arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(flat), column.type.list_size))
    return pa.record_batch(arrays, schema=manifest.schema)


def said_in(block: pa.RecordBatch, manifest: LogitsManifest) -> tuple[Ids, Floats]:
    """Ids and values of the sample in a block, of shape SK.

    Raises:
        ValueError: it is no block of such a sample.
    """
    shape = (manifest.tokens, manifest.top_k)
    ids, values = (block.column(name).values.to_numpy().reshape(shape) for name in ("ids", "values"))
    if manifest.stored_as == "bf16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return ids.astype(np.int64), values.astype(np.float32)


def _chunk_files(store: Store) -> list[str]:
    return sorted(name for name in store.sizes("chunks") if name.endswith(".parquet"))


def _rows_in(store: Store, names: Sequence[str]) -> pa.Table:
    tables = [pq.read_table(pa.BufferReader(bytes(store.read(name))), use_threads=False) for name in names]
    return pa.concat_tables([ROWS_SCHEMA.empty_table(), *tables])


def _part_name(part: int) -> str:
    return f"index/{part:06d}.parquet"
