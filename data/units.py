"""The part of preparing that is done to each stretch of the input by itself: read, judge, tokenise, set aside.

A unit is what one process does at a time. It leaves its tokens in `work/tokens/` and, last, a table of its documents in
`work/units/`, which says that it is done. Both are named by all that they depend on, so what is there need not be done
again, and what was done with other options is not taken for it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from conf.schema import StorageConfig
from data.documents import Piece, PieceReader, Record, not_utf8, pieces
from data.index import FORMAT_VERSION, InputRecord, table_bytes
from data.inputs import InputFile
from data.kafka import is_topic
from data.near import BANDS, SKETCH_BYTES, signatures
from data.overlap import Evaluation
from data.steps import Dropped, Judge, Kept, Steps
from data.storage import Store
from data.tokenizer import Tokenizer
from data.writer import DatasetFacts

UNIT_BYTES = 64 << 20
"""Input of a unit, as it is stored: a minute's work of a core."""
BATCH_CHARACTERS = 2 << 20
"""Text judged and tokenised at once: enough to keep all cores busy."""
BLOCK_CHARACTERS = 32 << 20
"""Text whose tokens are kept together; bounds the memory of a unit however large its file is."""

UNIT_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("piece", pa.int32()),
        ("row", pa.int64()),
        ("characters", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("digest", pa.binary(16)),
        ("bands", pa.binary(8 * BANDS)),
        ("sketch", pa.binary(SKETCH_BYTES)),
        ("block", pa.int32()),
        ("place", pa.int32()),
        ("num_tokens", pa.int64()),
    ]
)
"""Documents of a unit. `reason` is empty for those that may be kept; `block` is -1 for one that repeats an earlier one
of its unit, which is dropped later with the others; `bands` and `sketch` are null where near-duplicates are kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a process must know to do its share.

    Attributes:
        location: where the dataset is being made.
        storage: how storage is spoken to.
        steps: what is done to each document.
        facts: what the dataset is.
        text_field: column or key of the text.
        tokenizer: its `tokenizer.json`.
        evaluation: name of the object with the hashes of text to keep out of training; None: there is none.
    """

    location: str
    storage: StorageConfig
    steps: Steps
    facts: DatasetFacts
    text_field: str
    tokenizer: bytes = field(repr=False)
    evaluation: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A stretch of the input, and the hash of all that its result depends on."""

    pieces: tuple[Piece, ...]
    key: str

    def to_json(self) -> str:
        """For a process elsewhere."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Unit:
        """The inverse of `to_json`."""
        record = json.loads(text)
        found = (Piece(InputFile(**piece["file"]), piece["first"], piece["end"]) for piece in record["pieces"])
        return cls(pieces=tuple(found), key=record["key"])


def unit_name(key: str) -> str:
    """Name of the table that says a unit is done."""
    return f"work/units/{key}.parquet"


def tokens_name(key: str, block: int) -> str:
    """Name of a block of tokens of a unit."""
    return f"work/tokens/{key}-{block:04d}.arrow"


def units_of(files: Sequence[InputFile], job: Job, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """The input cut into units, in order; a matter of the files alone.

    Raises:
        DataError: a file is parquet by its name and has no readable footer.
    """
    units: list[Unit] = []
    together: list[Piece] = []
    size = 0
    for file in files:
        found = pieces(file, unit_bytes, job.storage)
        for piece in found:
            together.append(piece)
            size += file.num_bytes // len(found)
            if size >= unit_bytes:
                units.append(_unit(together, job))
                together, size = [], 0
    return [*units, _unit(together, job)] if together else units


def _unit(together: Sequence[Piece], job: Job) -> Unit:
    facts = [FORMAT_VERSION, hashlib.sha256(job.tokenizer).hexdigest(), job.text_field, job.evaluation]
    options = [*facts, job.facts.held_out_fraction, asdict(job.steps), [asdict(piece) for piece in together]]
    key = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:32]
    return Unit(pieces=tuple(together), key=key)


def process(job: Job, unit_json: str) -> str:
    """Do a unit.

    Returns:
        Its key.

    Raises:
        DataError: a file cannot be read as what its name says, or something cannot be written.
    """
    unit = Unit.from_json(unit_json)
    tools = _tools(job)
    work = _UnitWork(tools, unit.key)
    num_lines: list[int] = []
    messages: list[tuple[int, str]] = []
    for number, piece in enumerate(unit.pieces):
        reader = PieceReader(piece, job.text_field, job.storage)
        for record in reader:
            if record.fault == "not_utf8" and job.steps.invalid_utf8 == "refuse":
                raise not_utf8(reader.place(record))
            work.add(number, record)
        num_lines.append(reader.num_lines)
        messages.append((reader.num_bytes, reader.digest.hexdigest()))
    facts = {"num_lines": json.dumps(num_lines), "messages": json.dumps(messages)}
    table = work.finish().replace_schema_metadata(facts)
    tools.store.write(unit_name(unit.key), table_bytes(table))
    return unit.key


def read_unit(content: memoryview) -> tuple[pa.Table, list[int]]:
    """A unit's table, and the lines of each of its pieces."""
    table = pq.read_table(pa.BufferReader(content), use_threads=False)
    return table, json.loads(table.schema.metadata[b"num_lines"])


def messages_read(store: Store, units: Sequence[Unit], files: Sequence[InputFile]) -> dict[InputFile, InputRecord]:
    """Lineage of the stretches of topics among the input, without reading them again.

    The hash of one is over those of its pieces, whose bounds do not depend on how units are cut.
    """
    sizes: Counter[InputFile] = Counter()
    digests: dict[InputFile, list[str]] = {file: [] for file in files if is_topic(file.folder)}
    for unit in units:
        if not any(is_topic(piece.file.folder) for piece in unit.pieces):
            continue
        schema = pq.read_schema(pa.BufferReader(store.read(unit_name(unit.key))))
        for piece, (size, digest) in zip(unit.pieces, json.loads(schema.metadata[b"messages"]), strict=True):
            if piece.file in digests:
                sizes[piece.file] += size
                digests[piece.file].append(digest)
    hashes = {file: hashlib.sha256("".join(found).encode()).hexdigest() for file, found in digests.items()}
    return {file: InputRecord(path=str(file), num_bytes=sizes[file], sha256=hashes[file]) for file in digests}


def read_tokens(content: memoryview) -> pa.ListArray:
    """The tokens of each document of a block."""
    return pa.ipc.open_file(pa.BufferReader(content)).get_batch(0).column(0)


@dataclass(frozen=True, slots=True)
class _Tools:
    """What a process makes once and uses for all its units."""

    store: Store
    steps: Steps
    facts: DatasetFacts
    tokenizer: Tokenizer
    evaluation: Evaluation | None


@functools.lru_cache(maxsize=2)
def _tools(job: Job) -> _Tools:
    store = Store.open(job.location, job.storage)
    evaluation = None
    if job.evaluation:
        evaluation = Evaluation(np.frombuffer(store.read(job.evaluation), np.uint64))
    return _Tools(store, job.steps, job.facts, Tokenizer(job.tokenizer, "tokenizer"), evaluation)


class _UnitWork:
    """Documents as they come, judged and tokenised in batches, their tokens written in blocks."""

    def __init__(self, tools: _Tools, key: str) -> None:
        self._tools = tools
        self._key = key
        self._judge = Judge(tools.steps, tools.facts.held_out_fraction, tools.evaluation)
        self._seen: set[bytes] = set()
        self._rows: list[dict[str, object]] = []
        self._batch: list[tuple[dict[str, object], Kept]] = []
        self._batch_characters = 0
        self._tokens: list[npt.NDArray[np.uint32]] = []
        self._block_characters = 0
        self._num_blocks = 0

    def add(self, piece: int, read: Record) -> None:
        """Judge a document."""
        text = read.text or ""
        verdict = Dropped(read.fault, "") if read.fault else self._judge.verdict(text)
        record: dict[str, object] = {"id": read.id, "piece": piece, "row": read.row, "characters": len(text)}
        record |= {"reason": "", "detail": "", "block": -1, "place": -1, "num_tokens": 0}
        self._rows.append(record)
        if isinstance(verdict, Dropped):
            record["reason"], record["detail"] = verdict
            return
        record["digest"] = verdict.digest
        if verdict.digest in self._seen:
            return
        self._seen.add(verdict.digest)
        self._batch.append((record, verdict))
        self._batch_characters += len(verdict.text)
        if self._batch_characters >= BATCH_CHARACTERS:
            self._tokenise()

    def finish(self) -> pa.Table:
        """Write what is open; the table of all documents."""
        self._tokenise()
        self._write()
        return pa.Table.from_pylist(self._rows, schema=UNIT_SCHEMA)

    def _tokenise(self) -> None:
        kept = [verdict for _, verdict in self._batch]
        if kept and self._tools.steps.near_duplicates:
            keys, sketches = signatures([verdict.words for verdict in kept if verdict.words is not None])
            for (record, _), row, sketch in zip(self._batch, keys, sketches, strict=True):
                record |= {"bands": row.tobytes(), "sketch": sketch.tobytes()}
        for (record, _), tokens in zip(self._batch, self._encoded(kept), strict=True):
            record |= {"block": self._num_blocks, "place": len(self._tokens), "num_tokens": len(tokens)}
            self._tokens.append(tokens)
        self._block_characters += self._batch_characters
        self._batch, self._batch_characters = [], 0
        if self._block_characters >= BLOCK_CHARACTERS:
            self._write()

    def _encoded(self, kept: Sequence[Kept]) -> Iterator[npt.NDArray[np.uint32]]:
        return iter(self._tools.tokenizer.encode([verdict.text for verdict in kept]))

    def _write(self) -> None:
        if not self._tokens:
            return
        offsets = np.concatenate([[0], np.cumsum([len(tokens) for tokens in self._tokens])]).astype(np.int32)
        values = np.concatenate(self._tokens).astype(self._tools.facts.dtype)
        batch = pa.record_batch({"tokens": pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as file:
            file.write_batch(batch)
        self._tools.store.write(tokens_name(self._key, self._num_blocks), sink.getvalue().to_pybytes())
        self._tokens, self._block_characters = [], 0
        self._num_blocks += 1
