from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeDataset

from conf.errors import DataError
from data.index import SPLITS, ShardEntry, identity_of, index_bytes
from data.shards import Dataset


def entries_of(dataset: Dataset) -> list[ShardEntry]:
    return [dataset._splits[split].entry(number) for split in SPLITS for number in range(len(dataset._splits[split]))]


def rewrite_index(dataset: Dataset, entries: list[ShardEntry]) -> None:
    """An index and a manifest that agree with one another: what an attacker or a faulty tool could write."""
    root = Path(dataset.path)
    (root / "index.parquet").write_bytes(index_bytes(entries))
    manifest = json.loads((root / "dataset.json").read_text())
    manifest["identity"] = identity_of(entries, manifest["tokenizer_sha256"])
    (root / "dataset.json").write_text(json.dumps(manifest))


def test_tokens_across_shards_are_the_documents_one_after_another(make_dataset: MakeDataset) -> None:
    dataset = make_dataset()
    assert dataset.manifest.splits["train"].num_shards > 3
    documents = [dataset.document("train", number).tokens for number in range(dataset.num_documents("train"))]
    stream = np.concatenate(documents)
    assert dataset.tokens("train", 0, dataset.num_tokens("train")).tolist() == stream.tolist()
    for start in range(0, len(stream) - 700, 331):
        assert dataset.tokens("train", start, 700).tolist() == stream[start : start + 700].tolist()


def test_a_window_names_the_documents_it_covers(make_dataset: MakeDataset) -> None:
    dataset = make_dataset()
    documents = [dataset.document("train", number) for number in range(dataset.num_documents("train"))]
    owner = np.repeat([document.id for document in documents], [len(document.tokens) for document in documents])
    for start in range(0, len(owner) - 300, 97):
        expected = list(dict.fromkeys(owner[start : start + 300].tolist()))
        assert dataset.document_ids("train", start, 300) == expected
        numbers = dataset.document_numbers("train", start, 300)
        assert [dataset.document("train", number).id for number in numbers] == expected
    first = len(documents[0].tokens)
    assert dataset.document_ids("train", 0, first) == [documents[0].id]
    assert dataset.document_ids("train", first, 1) == [documents[1].id]


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 0), (0, 10**9), (10**9, 1)])
def test_a_range_outside_is_refused(make_dataset: MakeDataset, start: int, count: int) -> None:
    dataset = make_dataset()
    with pytest.raises(IndexError):
        dataset.tokens("train", start, count)
    with pytest.raises(IndexError):
        dataset.document("train", start - 1 if start < 0 else 10**9)


def test_a_shard_is_read_without_copying_and_the_cache_is_bounded(make_dataset: MakeDataset) -> None:
    dataset = Dataset.open(make_dataset().path, cache_bytes=1)
    one, again = dataset.tokens("train", 0, 50), dataset.tokens("train", 20, 50)
    assert np.shares_memory(one, again)
    assert not one.flags.writeable
    dataset.tokens("train", 0, dataset.num_tokens("train"))
    assert len(dataset._cache) == 1


def test_one_flipped_bit_is_noticed_and_the_shard_named(make_dataset: MakeDataset) -> None:
    dataset = make_dataset()
    shard = Path(dataset.path) / "train/000001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    damaged = Dataset.open(dataset.path)
    with pytest.raises(DataError, match=r"train/000001\.parquet: corrupt shard"):
        damaged.tokens("train", 0, damaged.num_tokens("train"))


def test_truncated_and_missing_shards_are_named_when_the_dataset_is_opened(make_dataset: MakeDataset) -> None:
    dataset = make_dataset()
    shard = Path(dataset.path) / "held_out/000000.parquet"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"held_out/000000\.parquet: truncated"):
        Dataset.open(dataset.path)
    shard.unlink()
    with pytest.raises(DataError, match=r"held_out/000000\.parquet: missing shard"):
        Dataset.open(dataset.path)


def test_a_shard_that_goes_after_opening_is_named(make_dataset: MakeDataset) -> None:
    dataset = Dataset.open(make_dataset().path)
    (Path(dataset.path) / "train/000000.parquet").unlink()
    with pytest.raises(DataError, match=r"train/000000\.parquet: cannot be read"):
        dataset.tokens("train", 0, 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"path": "train/../../secret.parquet"}, "leaves the dataset"),
        ({"path": "/etc/passwd"}, "not a plain path"),
        ({"path": "train\\x.parquet"}, "not a plain path"),
        ({"path": "held_out/000000.parquet"}, "not a plain path inside the folder 'train'"),
        ({"split": "other"}, "unknown split"),
        ({"num_tokens": -5}, "must be at least 1"),
        ({"num_bytes": 0}, "must be at least 1"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_index_that_cannot_be_is_refused(make_dataset: MakeDataset, change: dict[str, Any], says: str) -> None:
    dataset = make_dataset()
    first, *rest = entries_of(dataset)
    rewrite_index(dataset, [dataclasses.replace(first, **change), *rest])
    with pytest.raises(DataError, match=says):
        Dataset.open(dataset.path)


def test_totals_must_agree_and_shards_be_named_once(make_dataset: MakeDataset) -> None:
    dataset = make_dataset()
    entries = entries_of(dataset)
    rewrite_index(dataset, entries[1:])
    with pytest.raises(DataError, match=r"dataset\.json says"):
        Dataset.open(dataset.path)
    rewrite_index(dataset, [entries[0], *entries])
    with pytest.raises(DataError, match="names a shard twice"):
        Dataset.open(dataset.path)


def test_an_index_of_another_dataset_is_refused(make_dataset: MakeDataset) -> None:
    one, other = make_dataset("one"), make_dataset("other")
    (Path(one.path) / "index.parquet").write_bytes((Path(other.path) / "index.parquet").read_bytes())
    with pytest.raises(DataError, match="does not belong"):
        Dataset.open(one.path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("dataset.json", b"{", "damaged manifest"),
        ("dataset.json", b'{"format_version": 1}', "damaged manifest"),
        ("dataset.json", b'{"format_version": 99}', "format version 99"),
        ("index.parquet", b"PAR1", "not an index"),
    ],
)
def test_damaged_files_are_named(make_dataset: MakeDataset, name: str, content: bytes, says: str) -> None:
    dataset = make_dataset()
    (Path(dataset.path) / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}.*{says}"):
        Dataset.open(dataset.path)


def test_a_dataset_is_read_by_uri_too(make_dataset: MakeDataset) -> None:
    dataset = make_dataset()
    by_uri = Dataset.open(f"file://{dataset.path}")
    assert by_uri.tokens("train", 0, 100).tolist() == dataset.tokens("train", 0, 100).tolist()
    assert by_uri.path == f"file://{dataset.path}"
    with pytest.raises(DataError, match="cannot be opened"):
        Dataset.open("nonsense://somewhere")
