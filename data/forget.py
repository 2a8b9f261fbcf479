"""Take documents out of a dataset for good: `python -m data.forget DOCUMENT_ID... --dataset DIR [--runs DIR]`.

The places of a document's tokens become end-of-text tokens, so everything else stays where it is: only the shards that
hold something of it are written anew, and sample numbers keep their meaning. Its row stays, as `(forgotten)`. The
dataset gets another identity; a tombstone beside it keeps the document out of what is prepared there later.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from conf.errors import DataError, UserError
from conf.schema import StorageConfig
from data.index import (
    FORGOTTEN_ID,
    MANIFEST_NAME,
    SPLITS,
    ShardEntry,
    Split,
    documents_name,
    identity_of,
    part_bytes,
    part_name,
    part_row,
    root_bytes,
    root_name,
)
from data.seen import sightings
from data.shards import Access, Dataset
from data.storage import Store
from data.tombstones import Passage, Tombstone, parent_and_name, read_tombstones, write_tombstone
from data.writer import SHARD_DIGITS, DatasetFacts, totals_of, write_shard

NUM_READERS = 8
COMMIT = "forgetting/commit.json"
"""Lists the changes that make the new dataset; where it is, they are carried out, by this process or the next."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forgotten:
    """What was done.

    Attributes:
        passages: where the documents were.
        shards: paths of the shards that held something of them, and are gone.
        tombstones: acts of forgetting these documents, this one last.
        identities: of all datasets that held one of them: this one's as it was, and what it was before that.
        becomes: identity of the dataset without them.
    """

    passages: tuple[Passage, ...]
    shards: tuple[str, ...]
    tombstones: tuple[Tombstone, ...]
    identities: frozenset[str]
    becomes: str


def forget(documents: Sequence[str], location: str, storage: StorageConfig | None = None) -> Forgotten:
    """Take documents out of a dataset. Killed in the middle, it is run again.

    Raises:
        DataError: a document is not in the dataset and never was (then nothing is changed), the dataset is damaged, or
            it cannot be written.
    """
    store = Store.open(location, storage)
    _carry_out(store)
    dataset = Dataset.open(location, Access(storage=storage))
    try:
        return _forget(frozenset(documents), dataset, storage)
    finally:
        dataset.close()


def _forget(documents: frozenset[str], dataset: Dataset, storage: StorageConfig | None) -> Forgotten:
    folder, name = parent_and_name(dataset.path)
    passages = tuple(passages_of(dataset, documents))
    earlier = [
        stone for stone in read_tombstones(folder, storage) if stone.dataset == name and documents & {*stone.documents}
    ]
    unknown = (
        documents - {passage.id for passage in passages} - {found for stone in earlier for found in stone.documents}
    )
    if unknown:
        raise DataError(
            f"{dataset.path}: holds no document {', '.join(sorted(unknown))}. Nothing was changed. "
            "python -m data.show names the documents of a step; a duplicate goes by the name of its first."
        )
    if not passages:
        before = {stone.identity for stone in earlier}
        identities = _ancestors(before, read_tombstones(folder, storage))
        return Forgotten(
            passages=_told(earlier, documents),
            shards=(),
            tombstones=tuple(earlier),
            identities=identities,
            becomes=dataset.identity,
        )
    entries = _rewritten(dataset, passages, documents)
    changes, becomes = _new_index(dataset, entries)
    old = [part.path(inside) for part, inside in (dataset.part_of(*changed) for changed in entries)]
    stone = Tombstone(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        documents=tuple(sorted({passage.id for passage in passages})),
        dataset=name,
        identity=dataset.identity,
        becomes=becomes,
        passages=passages,
    )
    # First, so that whatever happens from here on, the document does not come back.
    write_tombstone(folder, stone, storage)
    _commit(dataset.store, changes, [*old, *map(documents_name, old)])
    _carry_out(dataset.store)
    identities = _ancestors({dataset.identity}, read_tombstones(folder, storage))
    _check(dataset.path, passages, storage)
    return Forgotten(
        passages=(*passages, *_told(earlier, documents)),
        shards=tuple(old),
        tombstones=(*earlier, stone),
        identities=identities,
        becomes=becomes,
    )


def _told(earlier: Sequence[Tombstone], documents: frozenset[str]) -> tuple[Passage, ...]:
    """Where documents were that were forgotten before, as far as it was written down."""
    return tuple(passage for stone in earlier for passage in stone.passages if passage.id in documents)


def passages_of(dataset: Dataset, documents: frozenset[str]) -> Iterator[Passage]:
    """Where documents are, by the tables of all shards.

    Raises:
        DataError: a table is missing or damaged.
    """
    wanted = pa.array(sorted(documents), pa.string())

    def rows_of(split: Split, shard: int) -> list[dict[str, object]]:
        table = dataset.documents(split, shard)
        found: list[dict[str, object]] = table.filter(pc.is_in(table.column("id"), wanted)).to_pylist()
        return found

    seen: set[Passage] = set()
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for split in SPLITS:
            for rows in pool.map(rows_of, [split] * dataset.num_shards(split), range(dataset.num_shards(split))):
                for row in rows:
                    first = int(str(row["first_token"]))
                    after = first + int(str(row["num_tokens"]))
                    passage = Passage(id=str(row["id"]), split=split, first=first, after=after)
                    # One that goes on in the next shard is in its table too.
                    if passage not in seen:
                        seen.add(passage)
                        yield passage


def shards_of(passage: Passage, shard_tokens: int) -> range:
    """The shards that hold a token of a passage; a shard also holds the first token of the next one."""
    return range(max(passage.first - 1, 0) // shard_tokens, (passage.after - 1) // shard_tokens + 1)


def _rewritten(
    dataset: Dataset, passages: Sequence[Passage], documents: frozenset[str]
) -> dict[tuple[Split, int], ShardEntry]:
    """Write the shards of passages anew, beside the old ones."""
    size = dataset.manifest.block_tokens * dataset.manifest.shard_blocks
    by_shard: dict[tuple[Split, int], list[Passage]] = {}
    for passage in passages:
        for shard in shards_of(passage, size):
            by_shard.setdefault((passage.split, shard), []).append(passage)
    about = hashlib.sha256(json.dumps([dataset.identity, sorted(documents)]).encode()).hexdigest()[:8]
    entries = {}
    for (split, shard), inside in sorted(by_shard.items()):
        path = f"{split}/shards/{shard:0{SHARD_DIGITS}d}-{about}.arrow"
        entries[split, shard] = _rewritten_shard(dataset, split, shard, inside, path)
    return entries


def _rewritten_shard(dataset: Dataset, split: Split, shard: int, passages: Sequence[Passage], path: str) -> ShardEntry:
    manifest = dataset.manifest
    first_block = shard * manifest.shard_blocks
    num_blocks = -(-dataset.num_tokens(split) // manifest.block_tokens)
    blocks = []
    for number in range(first_block, min(first_block + manifest.shard_blocks, num_blocks)):
        tokens = dataset.block(split, number).copy()
        start = number * manifest.block_tokens
        for passage in passages:
            low, high = max(passage.first - start, 0), passage.after - start
            if high > 0:
                tokens[low:high] = manifest.end_of_text_id
        blocks.append(tokens)
    facts = DatasetFacts(
        tokenizer_sha256=manifest.tokenizer_sha256,
        vocab_size=manifest.vocab_size,
        end_of_text_id=manifest.end_of_text_id,
        held_out_fraction=manifest.held_out_fraction,
        block_tokens=manifest.block_tokens,
        shard_blocks=manifest.shard_blocks,
    )
    gone = {passage.id for passage in passages}
    table = dataset.documents(split, shard)
    rows = table.to_pylist()
    for row in rows:
        if row["id"] in gone:
            row.update({"id": FORGOTTEN_ID, "source": ""} | ({"row": 0} if "row" in row else {}))
    return write_shard(dataset.store, path, blocks, pa.Table.from_pylist(rows, schema=table.schema), facts)


def _new_index(dataset: Dataset, entries: Mapping[tuple[Split, int], ShardEntry]) -> tuple[dict[str, bytes], str]:
    """Name -> content of what changes in the index, the manifest last; and the identity."""
    changes: dict[str, bytes] = {}
    roots, totals = [], {}
    for split in SPLITS:
        rows = pq.read_table(pa.BufferReader(dataset.store.read(root_name(split)))).to_pylist()
        size = dataset.part_shards(split)
        for number in sorted({shard // size for changed, shard in entries if changed == split}):
            part, first = dataset.part(split, number), number * size
            kept = [entries.get((split, first + shard)) or part.entry(shard) for shard in range(len(part))]
            content = part_bytes(kept)
            changes[part_name(split, number)] = content
            rows[number] = part_row(kept, content)
        roots.append(root_bytes(rows))
        totals[split] = totals_of(rows)
        changes[root_name(split)] = roots[-1]
    manifest = replace(dataset.manifest, splits=totals)
    manifest = replace(manifest, identity=identity_of(manifest, roots))
    changes[MANIFEST_NAME] = manifest.to_json()
    return changes, manifest.identity


def _commit(store: Store, changes: Mapping[str, bytes], removed: Sequence[str]) -> None:
    """Set the changes aside, then decide that they are made."""
    staged = {}
    for name, content in changes.items():
        staged[name] = f"forgetting/{hashlib.sha256(content).hexdigest()[:32]}"
        store.write(staged[name], content)
    store.write(COMMIT, json.dumps({"staged": staged, "removed": list(removed)}).encode())


def _carry_out(store: Store) -> None:
    """Make the changes that were decided on, if any; again does no harm."""
    if not store.exists(COMMIT):
        for name in store.sizes("forgetting"):
            store.delete(name)
        return
    decided = json.loads(bytes(store.read(COMMIT)))
    for name, staged in decided["staged"].items():
        store.write(name, bytes(store.read(staged)))
    for name in decided["removed"]:
        store.delete(name)
    store.delete(COMMIT)
    for staged in decided["staged"].values():
        store.delete(staged)


def _check(location: str, passages: Sequence[Passage], storage: StorageConfig | None) -> None:
    """Read the places of the documents back.

    Raises:
        DataError: something of one is still there.
    """
    dataset = Dataset.open(location, Access(storage=storage))
    dataset.check_stored()
    for passage in passages:
        tokens = dataset.tokens(passage.split, passage.first, passage.after - passage.first)
        if (tokens != dataset.end_of_text_id).any():
            raise DataError(f"{location}: {passage.id} is still there. Was another process writing? Run it again.")
    dataset.close()


def _ancestors(identities: Iterable[str], stones: Sequence[Tombstone]) -> frozenset[str]:
    """Identities, and those of what datasets were before something else was forgotten from them."""
    found = set(identities)
    while more := {stone.identity for stone in stones if stone.becomes in found} - found:
        found |= more
    return frozenset(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point.

    Returns:
        Exit code: 0, or 2 for what the user can mend.
    """
    parser = argparse.ArgumentParser(prog="python -m data.forget", description=__doc__)
    parser.add_argument("documents", nargs="+", metavar="DOCUMENT_ID")
    parser.add_argument("--dataset", required=True, metavar="DIR", help="folder or URI of the dataset")
    parser.add_argument("--runs", type=Path, metavar="DIR", help="also say which checkpoints in it had seen them")
    options = parser.parse_args(arguments)
    try:
        done = forget(options.documents, options.dataset)
        # Tombstones of before places were written down do not say where a document was.
        known = {passage.id for passage in done.passages} >= {*options.documents}
        seen = sightings(options.runs, done.identities, done.passages if known else ()) if options.runs else []
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for passage in done.passages:
        print(f"{passage.id}: {passage.split} tokens {passage.first} to {passage.after - 1}")
    for stone in done.tombstones:
        print(f"forgotten {stone.time}: {', '.join(stone.documents)}")
    for shard in done.shards:
        print(f"rewritten: {shard}")
    print(f"{options.dataset}: identity {done.becomes[:12]}")
    print("Caches keep blocks until they are evicted or end: empty disk and Redis tiers that were in front of it.")
    for sighting in seen:
        print(f"{'had seen it' if sighting.saw else 'had not seen it'}: {sighting.checkpoint} ({sighting.why})")
    if options.runs and not seen:
        print(f"no checkpoint in {options.runs} was made from a dataset that held it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
