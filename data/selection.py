"""Which of all documents make up the dataset, and which of them each shard holds: decided over all of them, in order.

Held in memory: some 50 bytes a document, and 224 more where near-duplicates are looked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.documents import is_held_out
from data.index import SPLITS, Split, table_bytes
from data.near import BANDS, SKETCH_BYTES, Keys, Sketches, first_of_equals, first_of_near
from data.report import Report
from data.storage import MissingObjectError, Store
from data.units import Job, Unit, read_tokens, read_unit, tokens_name, unit_name
from data.writer import DOCUMENTS_SCHEMA, ROW_FIELD, SHARD_DIGITS, entry_to_json, write_shard

NUM_READERS = 8
KEPT, DUPLICATE, NEAR_DUPLICATE, FORGOTTEN = range(4)
REASONS = ("", "duplicate", "near_duplicate", "forgotten")
PLAN_SCHEMA = (
    DOCUMENTS_SCHEMA.append(ROW_FIELD).append(pa.field("tokens", pa.string())).append(pa.field("place", pa.int32()))
)


@dataclass(frozen=True, slots=True)
class UnitDocuments:
    """The documents of a unit, in order; `candidates` are the places of those that no step has dropped so far."""

    unit: Unit
    table: pa.Table
    ids: list[str]
    sources: list[str]
    rows: list[int]
    candidates: npt.NDArray[np.int64]


def unit_documents(store: Store, units: Sequence[Unit]) -> Iterator[UnitDocuments]:
    """The documents of all units, in order, with their ids and the rows of their files."""
    lines_before: Counter[str] = Counter()
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for start in range(0, len(units), NUM_READERS):
            some = units[start : start + NUM_READERS]
            for unit, content in zip(some, pool.map(lambda unit: store.read(unit_name(unit.key)), some), strict=True):
                table, num_lines = read_unit(content)
                before = []
                for piece, lines in zip(unit.pieces, num_lines, strict=True):
                    if not piece.first:
                        del lines_before[str(piece.file)]
                    before.append(lines_before[str(piece.file)])
                    lines_before[str(piece.file)] += lines
                numbers = table.column("piece").to_pylist()
                sources = [unit.pieces[number].file.name for number in numbers]
                rows = [before[n] + row for n, row in zip(numbers, table.column("row").to_pylist(), strict=True)]
                ids = [
                    given if given is not None else f"{source}:{row}"
                    for given, source, row in zip(table.column("id").to_pylist(), sources, rows, strict=True)
                ]
                reasons = table.column("reason").to_numpy(zero_copy_only=False)
                yield UnitDocuments(unit, table, ids, sources, rows, np.flatnonzero(reasons == ""))


@dataclass(slots=True)
class Selection:
    """What becomes of every candidate, in the order of the input.

    Attributes:
        verdicts: int8, KEPT and so on.
        representatives: int64, the candidate that stands for it: itself, or an earlier one that it is equal to or near.
    """

    verdicts: npt.NDArray[np.int8]
    representatives: npt.NDArray[np.int64]

    @classmethod
    def of(
        cls,
        digests: npt.NDArray[np.uint64],
        near: tuple[Keys, Sketches] | None,
        forgotten: npt.NDArray[np.bool_],
    ) -> Selection:
        """Decide.

        Args:
            digests: uint64 of shape (candidates, 2).
            near: as from `near.signatures`; None: near-duplicates are kept.
            forgotten: whether a document of this id was forgotten; then so are those that are equal to it or near it.
        """
        count = len(digests)
        verdicts = np.zeros(count, np.int8)
        equal = first_of_equals(digests)
        representatives = equal
        if near is not None:
            keys, sketches = near
            first = np.flatnonzero(equal == np.arange(count))
            group = np.arange(count)
            group[first] = first[first_of_near(keys[first], sketches[first])]
            representatives = group[equal]
            verdicts[representatives != equal] = NEAR_DUPLICATE
        verdicts[equal != np.arange(count)] = DUPLICATE
        gone = np.zeros(count, bool)
        gone[representatives[forgotten]] = True
        verdicts[gone[representatives]] = FORGOTTEN
        return cls(verdicts, representatives)


def select(
    store: Store, units: Sequence[Unit], tombstones: frozenset[str], report: Report, *, near_duplicates: bool
) -> Selection:
    """Decide over all documents; the report gets those that were dropped before, and how many there are."""
    digests, keys, sketches, forgotten = [], [], [], []
    met: set[str] = set()
    for documents in unit_documents(store, units):
        report.add_unit(documents.table, documents.ids, documents.sources, documents.rows)
        kept = documents.table.take(documents.candidates)
        digests.append(_words(kept.column("digest"), 2))
        if near_duplicates:
            # One that repeats an earlier one of its unit has none, and needs none.
            bands = kept.column("bands").fill_null(bytes(8 * BANDS))
            keys.append(_words(bands, BANDS))
            sketch = b"".join(kept.column("sketch").fill_null(bytes(SKETCH_BYTES)).to_pylist())
            sketches.append(np.frombuffer(sketch, np.uint8).reshape(-1, SKETCH_BYTES))
        here = np.array([documents.ids[place] in tombstones for place in documents.candidates], bool)
        met.update(documents.ids[place] for place in documents.candidates[here])
        forgotten.append(here)
    report.tombstones_unmet = sorted(tombstones - met)
    near = None
    if near_duplicates:
        near = (
            np.concatenate([np.zeros((0, BANDS), np.uint64), *keys]),
            np.concatenate([np.zeros((0, SKETCH_BYTES), np.uint8), *sketches]),
        )
    return Selection.of(
        np.concatenate([np.zeros((0, 2), np.uint64), *digests]),
        near,
        np.concatenate([np.zeros(0, bool), *forgotten]),
    )


def _words(column: pa.ChunkedArray, count: int) -> npt.NDArray[np.uint64]:
    """Fixed-size binaries as big-endian numbers, uint64 of shape (rows, count)."""
    joined = b"".join(column.to_pylist())
    return np.frombuffer(joined, ">u8").reshape(-1, count).astype(np.uint64)


@dataclass(slots=True)
class _SplitPlan:
    """Documents of a split that are not yet in a finished plan of a shard."""

    rows: list[dict[str, object]] = field(default_factory=list)
    num_documents: int = 0
    num_tokens: int = 0
    num_shards: int = 0


def plan_shards(store: Store, units: Sequence[Unit], job: Job, selection: Selection, report: Report) -> list[str]:
    """Write what each shard is made of to `work/plans/`.

    Returns:
        Their names, each split's in order.
    """
    size = job.facts.block_tokens * job.facts.shard_blocks
    plans: dict[Split, list[str]] = {split: [] for split in SPLITS}
    states: dict[Split, _SplitPlan] = {split: _SplitPlan() for split in SPLITS}
    candidate = 0
    wanted = report.wanted_examples(REASONS, selection.verdicts, selection.representatives)
    for documents in unit_documents(store, units):
        columns = {name: documents.table.column(name).to_pylist() for name in ("digest", "block", "place")}
        lengths = documents.table.column("num_tokens").to_pylist()
        characters = documents.table.column("characters").to_pylist()
        for at in documents.candidates.tolist():
            verdict = int(selection.verdicts[candidate])
            if candidate in wanted:
                report.name(candidate, documents.ids[at], documents.sources[at], documents.rows[at])
            if verdict != KEPT:
                report.add_dropped(REASONS[verdict], characters[at])
            candidate += 1
            if verdict != KEPT:
                continue
            split: Split = "held_out" if is_held_out(columns["digest"][at], job.facts.held_out_fraction) else "train"
            state = states[split]
            row: dict[str, object] = {"id": documents.ids[at], "source": documents.sources[at]}
            row |= {"number": state.num_documents, "first_token": state.num_tokens, "num_tokens": lengths[at] + 1}
            row |= {"row": documents.rows[at], "place": columns["place"][at]}
            row["tokens"] = tokens_name(documents.unit.key, columns["block"][at])
            state.rows.append(row)
            state.num_documents += 1
            state.num_tokens += lengths[at] + 1
            while state.num_tokens > (state.num_shards + 1) * size:
                plans[split].append(_write_plan(store, split, state, size))
    for split, state in states.items():
        report.kept[split] = state.num_documents
        if state.num_tokens > state.num_shards * size:
            plans[split].append(_write_plan(store, split, state, size))
    return [name for split in SPLITS for name in plans[split]]


def _write_plan(store: Store, split: Split, state: _SplitPlan, size: int) -> str:
    """Write the plan of the next shard, whose last block repeats the first token of the one after, if there is one."""
    first = state.num_shards * size
    end = min(first + size + 1, state.num_tokens)
    inside = [row for row in state.rows if _first(row) < end]
    path = f"{split}/shards/{state.num_shards:0{SHARD_DIGITS}d}.arrow"
    table = pa.Table.from_pylist(
        inside, schema=PLAN_SCHEMA.with_metadata({"path": path, "first": str(first), "end": str(end)})
    )
    name = f"work/plans/{split}-{state.num_shards:0{SHARD_DIGITS}d}.parquet"
    store.write(name, table_bytes(table))
    state.rows = [row for row in state.rows if _after(row) > first + size]
    state.num_shards += 1
    return name


def _first(row: dict[str, object]) -> int:
    value = row["first_token"]
    assert isinstance(value, int)
    return value


def _after(row: dict[str, object]) -> int:
    count = row["num_tokens"]
    assert isinstance(count, int)
    return _first(row) + count


def make_shard(job: Job, plan_name: str) -> str:
    """Write the shard of a plan, unless it is there.

    Returns:
        Its entry in the index, as JSON.

    Raises:
        DataError: something cannot be read or written.
    """
    store = Store.open(job.location, job.storage)
    content = store.read(plan_name)
    plan_sha256 = hashlib.sha256(content).hexdigest()
    marker = plan_name.replace("work/plans/", "work/shards/").replace(".parquet", ".json")
    with contextlib.suppress(MissingObjectError):
        done = json.loads(bytes(store.read(marker)))
        if done["plan_sha256"] == plan_sha256:
            return json.dumps(done["entry"])
        # Before the shard is overwritten: a marker must never outlive what it stands for.
        store.delete(marker)
    plan = pq.read_table(pa.BufferReader(content), use_threads=False)
    about = {
        key.decode(): value.decode()
        for key, value in plan.schema.metadata.items()
        if key in (b"path", b"first", b"end")
    }
    first, end = int(about["first"]), int(about["end"])
    facts = job.facts
    tokens = np.full(end - first, facts.end_of_text_id, facts.dtype)
    for name, rows in _by_block(plan):
        block = read_tokens(store.read(name))
        offsets, values = block.offsets.to_numpy(), block.values.to_numpy()
        for place, start in rows:
            text = values[offsets[place] : offsets[place + 1]]
            # A document may begin in an earlier shard, and end in a later one.
            low, high = max(start, first), min(start + len(text), end)
            if low < high:
                tokens[low - first : high - first] = text[low - start : high - start]
    size = facts.block_tokens
    held = min(end - first, size * facts.shard_blocks)
    blocks = [tokens[start : start + size + 1] for start in range(0, held, size)]
    inside = plan.filter(pc.less(plan.column("first_token"), first + held))
    schema = DOCUMENTS_SCHEMA.append(ROW_FIELD) if job.steps.rows else DOCUMENTS_SCHEMA
    documents = inside.select(schema.names).replace_schema_metadata(None).combine_chunks()
    entry = entry_to_json(write_shard(store, about["path"], blocks, documents, facts))
    store.write(marker, json.dumps({"plan_sha256": plan_sha256, "entry": entry}).encode())
    return json.dumps(entry)


def _by_block(plan: pa.Table) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Name of each block of tokens, with the places and first tokens of the documents in it, in order."""
    columns = (plan.column(name).to_pylist() for name in ("tokens", "place", "first_token"))
    last: str | None = None
    rows: list[tuple[int, int]] = []
    for name, place, first in zip(*columns, strict=True):
        if name != last and last is not None:
            yield last, rows
            rows = []
        last = name
        rows.append((place, first))
    if last is not None:
        yield last, rows
