"""What is stored, held against the index before anything is read from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from conf.errors import DataError
from data.index import SPLITS, BlockRef
from data.storage import ArchivedObjectError, MissingObjectError, Store

if TYPE_CHECKING:
    from data.shards import Dataset

LISTED_SHARDS = 1024
"""Shards of a split that are all looked at; there is one listing of them."""


def check_stored(dataset: Dataset, schema: pa.Schema) -> None:
    """Names and sizes of each split's shards, by one listing, or the first of many; and the type of a shard's tokens.

    Raises:
        DataError: a shard is missing, has another size or another type of tokens.
    """
    store = dataset.store
    for split in SPLITS:
        count = dataset.num_shards(split)
        if not count:
            continue
        sizes = store.sizes(f"{split}/shards") if count <= LISTED_SHARDS else {}
        for shard in range(count if sizes else 1):
            part, inside = dataset.part_of(split, shard)
            path = part.path(inside)
            stored = sizes.get(path) if sizes else _size_of(store, path)
            _check_size(store.name_of(path), stored, int(part.num_bytes[inside]))
        _check_schema(store, dataset.part(split, 0).block(0, 0), schema)


def _size_of(store: Store, path: str) -> int | None:
    try:
        return store.size_of(path)
    except MissingObjectError:
        return None


def _check_size(name: str, stored: int | None, indexed: int) -> None:
    if stored is None:
        raise DataError(f"{name}: missing shard. Copy it again or prepare the dataset anew.")
    if stored != indexed:
        raise DataError(
            f"{name}: truncated or changed shard ({stored} bytes, the index says {indexed}). "
            "Copy it again, or delete the dataset and prepare it anew."
        )


def _check_schema(store: Store, block: BlockRef, schema: pa.Schema) -> None:
    name = store.name_of(block.path)
    try:
        header = store.read(block.path, 8, block.start - 8)
        found = pa.ipc.read_schema(pa.py_buffer(header))
    except ArchivedObjectError:
        # It is restored when it is needed, and its blocks are checked as they are decoded.
        return
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name}: not a shard ({error}). Prepare the dataset anew.") from error
    if not found.equals(schema):
        raise DataError(f"{name}: a shard of {found}, and the vocabulary needs {schema}. Prepare it anew.")
