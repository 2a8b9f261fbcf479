"""Which documents were asked to be forgotten: ids and times, no text, in `tombstones/` beside the datasets of a folder.

They outlive the dataset they were forgotten from: whoever prepares another into the same folder leaves them out.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from conf.errors import DataError
from conf.schema import StorageConfig
from data.index import Split
from data.storage import Store

FOLDER = "tombstones"


@dataclass(frozen=True, kw_only=True, slots=True)
class Passage:
    """Where a document is: tokens [first, after) of a split."""

    id: str
    split: Split
    first: int
    after: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Tombstone:
    """One act of forgetting.

    Attributes:
        time: UTC, as in ISO 8601.
        documents: ids of the documents.
        dataset: name of the folder they were forgotten from.
        identity: of the dataset that held them.
        becomes: identity of the dataset without them.
        passages: where they were; empty: it was not written down.
    """

    time: str
    documents: tuple[str, ...]
    dataset: str
    identity: str
    becomes: str
    passages: tuple[Passage, ...] = ()


def parent_and_name(location: str) -> tuple[str, str]:
    """The folder or URI that a dataset is in, and its name there."""
    folder, _, name = location.rstrip("/").rpartition("/")
    if not folder or folder.endswith(":/"):
        raise DataError(f"{location}: a dataset must be in a folder, so that its tombstones can be beside it.")
    return folder, name


def read_tombstones(folder: str, storage: StorageConfig | None = None) -> list[Tombstone]:
    """All tombstones of a folder of datasets, oldest first.

    Raises:
        DataError: one cannot be read.
    """
    store = Store.open(folder, storage)
    found = []
    for name in sorted(store.sizes(FOLDER)):
        if not name.endswith(".json"):
            continue
        try:
            record = json.loads(bytes(store.read(name)))
            passages = tuple(Passage(**passage) for passage in record.get("passages", ()))
            found.append(Tombstone(**(record | {"documents": tuple(record["documents"]), "passages": passages})))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{store.name_of(name)}: not a tombstone ({error!r}). Restore it from a copy.") from error
    return sorted(found, key=lambda stone: stone.time)


def write_tombstone(folder: str, stone: Tombstone, storage: StorageConfig | None = None) -> str:
    """Record an act of forgetting.

    Returns:
        Full name of the record.

    Raises:
        DataError: it cannot be written.
    """
    store = Store.open(folder, storage)
    name = f"{FOLDER}/{stone.time.replace(':', '')}-{uuid.uuid4().hex[:8]}.json"
    store.write(name, (json.dumps(asdict(stone), indent=2) + "\n").encode())
    return store.name_of(name)


def forgotten_ids(folders: Sequence[str], storage: StorageConfig | None = None) -> frozenset[str]:
    """Ids of all documents forgotten in these folders."""
    return frozenset(
        document for folder in folders for stone in read_tombstones(folder, storage) for document in stone.documents
    )
