from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeDataset

from conf.errors import DataError
from data import writer as writer_module
from data.index import Manifest, ShardEntry, identity_of, part_bytes, part_name, part_row, root_bytes, root_name
from data.prepare import prepare
from data.shards import Access, Dataset
from data.storage import Store
from data.tokenizer import Tokenizer
from data.writer import DatasetFacts, DatasetWriter, block_hashes, token_shard_bytes


def write_dataset(root: Path, num_tokens: int, *, block_tokens: int = 64, shard_blocks: int = 3) -> Dataset:
    """Random documents of up to 99 tokens, and one held out."""
    facts = DatasetFacts(
        tokenizer_sha256="t",
        vocab_size=1000,
        end_of_text_id=0,
        held_out_fraction=0.1,
        block_tokens=block_tokens,
        shard_blocks=shard_blocks,
    )
    writer = DatasetWriter(Store.open(root), facts)
    random = np.random.default_rng(1)
    number = 0
    while num_tokens > 0:
        size = min(int(random.integers(1, 99)), num_tokens - 1)
        writer.add("train", f"doc{number}", "input.txt", random.integers(1, 1000, size))
        num_tokens -= size + 1
        number += 1
    writer.add("held_out", "other", "input.txt", np.arange(1, 20))
    writer.finish(num_duplicates=0, inputs=[])
    return Dataset.open(root)


def entries_of(dataset: Dataset) -> list[ShardEntry]:
    part = dataset.part("train", 0)
    return [part.entry(number) for number in range(len(part))]


def rewrite_index(dataset: Dataset, entries: list[ShardEntry], **changes: Any) -> None:
    """An index and a manifest that agree with one another: what an attacker or a faulty tool could write."""
    root = Path(dataset.path)
    part = part_bytes(entries)
    row = {**part_row(entries, part), **changes}
    (root / part_name("train", 0)).write_bytes(part)
    (root / root_name("train")).write_bytes(root_bytes([row]))
    record = json.loads((root / "dataset.json").read_text())
    record["splits"]["train"] = {name: row[name] for name in record["splits"]["train"]}
    manifest = Manifest.from_json(json.dumps(record).encode(), "x")
    record["identity"] = identity_of(manifest, [(root / root_name(split)).read_bytes() for split in manifest.splits])
    (root / "dataset.json").write_text(json.dumps(record))


def documents_of(dataset: Dataset) -> list[np.ndarray]:
    return [dataset.document("train", number).tokens for number in range(dataset.num_documents("train"))]


@pytest.mark.parametrize("num_tokens", [1500, 64 * 6, 64 * 6 + 1, 64, 30])
def test_tokens_across_blocks_and_shards_are_the_documents_one_after_another(tmp_path: Path, num_tokens: int) -> None:
    dataset = write_dataset(tmp_path / "set", num_tokens)
    assert dataset.num_shards("train") == -(-num_tokens // (64 * 3))
    stream = np.concatenate(documents_of(dataset))
    assert len(stream) == dataset.num_tokens("train") == num_tokens
    for start, count in (
        (0, num_tokens),
        (0, 1),
        (num_tokens - 1, 1),
        *((start, 65) for start in range(0, num_tokens - 65, 16)),
    ):
        assert dataset.tokens("train", start, count).tolist() == stream[start : start + count].tolist()
    dataset.close()


def test_a_window_that_ends_with_its_block_needs_no_other(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "set", 1500)
    (tmp_path / "set/train/shards/00000001.arrow").unlink()
    assert len(dataset.tokens("train", 64 * 2, 65)) == 65
    with pytest.raises(DataError, match=r"train/shards/00000001\.arrow: cannot be read"):
        dataset.tokens("train", 64 * 2, 66)


def test_a_window_names_the_documents_it_covers(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "set", 1500)
    lengths = [len(tokens) for tokens in documents_of(dataset)]
    owner = np.repeat([f"doc{number}" for number in range(len(lengths))], lengths)
    for start in range(0, len(owner) - 300, 97):
        expected = list(dict.fromkeys(owner[start : start + 300].tolist()))
        assert dataset.document_ids("train", start, 300) == expected
        numbers = dataset.document_numbers("train", start, 300)
        assert [dataset.document("train", number).id for number in numbers] == expected
    assert dataset.document_ids("train", 0, lengths[0]) == ["doc0"]
    assert dataset.document_ids("train", lengths[0], 1) == ["doc1"]


@pytest.mark.parametrize("part_shards", [1, 3])
def test_the_index_may_be_in_parts_of_any_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_shards: int
) -> None:
    whole = write_dataset(tmp_path / "whole", 1500)
    monkeypatch.setattr(writer_module, "PART_SHARDS", part_shards)
    cut = write_dataset(tmp_path / "cut", 1500)
    assert (cut.num_shards("train"), cut.part_shards("train")) == (8, part_shards)
    assert cut.tokens("train", 0, 1500).tolist() == whole.tokens("train", 0, 1500).tolist()
    assert all(map(np.array_equal, documents_of(cut), documents_of(whole)))
    assert cut.document_ids("train", 0, 1500) == whole.document_ids("train", 0, 1500)
    cut.check_stored()
    (tmp_path / "cut/train/shards/00000007.arrow").unlink()
    with pytest.raises(DataError, match=r"00000007\.arrow: missing shard"):
        cut.check_stored()


def test_parts_of_different_lengths_are_refused(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "set", 1500)
    entries = entries_of(dataset)
    parts = (entries[:3], entries[3:5], entries[5:])
    root = root_bytes([part_row(part, part_bytes(part)) for part in parts])
    (tmp_path / "set" / root_name("train")).write_bytes(root)
    with pytest.raises(DataError, match=r"train/index\.parquet: a part before the last does not have 3 shards"):
        Dataset.open(dataset.path)


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 0), (0, 10**9), (10**9, 1)])
def test_a_range_outside_is_refused(tmp_path: Path, start: int, count: int) -> None:
    dataset = write_dataset(tmp_path / "set", 100)
    for read in (dataset.tokens, dataset.document_ids):
        with pytest.raises(IndexError):
            read("train", start, count)
    with pytest.raises(IndexError):
        dataset.document("train", start - 1 if start < 0 else 10**9)


def test_a_block_is_read_without_copying_and_the_cache_is_bounded(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", 1500)
    dataset = Dataset.open(tmp_path / "set", Access(cache_bytes=1))
    one, again = dataset.tokens("train", 0, 50), dataset.tokens("train", 10, 50)
    assert np.shares_memory(one, again)
    assert not one.flags.writeable
    before = one.copy()
    dataset.tokens("train", 0, dataset.num_tokens("train"))
    assert len(dataset._blocks) == 2
    assert np.array_equal(one, before)


def test_neighbours_are_one_request_and_have_errors_of_their_own(tmp_path: Path) -> None:
    written = write_dataset(tmp_path / "set", 1500, shard_blocks=8)
    ref = written.part("train", 0).block(0, 2)
    before = written.store.counters.requests
    written.expect("train", range(12))
    expected = written.tokens("train", 0, 64 * 12)
    assert written.store.counters.requests == before + 3
    shard = tmp_path / "set" / ref.path
    content = bytearray(shard.read_bytes())
    content[ref.start + 100] ^= 1
    shard.write_bytes(content)
    damaged = Dataset.open(written.path)
    damaged.expect("train", range(4))
    for number in (0, 1, 3):
        assert np.array_equal(damaged.tokens("train", number * 64, 64), expected[number * 64 :][:64])
    with pytest.raises(DataError, match=f"bytes {ref.start} to {ref.start + ref.num_bytes} have another hash"):
        damaged.tokens("train", 2 * 64, 64)


def test_what_is_fetched_now_is_read_by_whoever_asks_and_has_its_errors_later(tmp_path: Path) -> None:
    written = write_dataset(tmp_path / "set", 1500, shard_blocks=8)
    expected = written.tokens("train", 0, 64 * 16)
    (tmp_path / "set/train/shards/00000001.arrow").unlink()
    dataset = Dataset.open(written.path)
    dataset.expect("train", range(12))
    dataset.fetch("train", [1, 7, 9])
    requests = dataset.store.counters.requests
    assert np.array_equal(dataset.tokens("train", 64, 64), expected[64:128])
    assert np.array_equal(dataset.tokens("train", 64 * 7, 64), expected[64 * 7 : 64 * 8])
    assert dataset.store.counters.requests == requests
    with pytest.raises(DataError, match=r"00000001\.arrow: cannot be read"):
        dataset.tokens("train", 64 * 9, 64)


def test_a_block_that_is_dropped_for_others_before_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write_dataset(tmp_path / "set", 1500).tokens("train", 0, 64)
    dataset = Dataset.open(tmp_path / "set", Access(cache_bytes=1))
    blocks = dataset._blocks
    read, others = blocks._read, iter([range(8, 12)])
    monkeypatch.setattr(blocks._pool, "submit", lambda *ignored: None)

    def dropped_before_it_is_read(*args: Any) -> None:
        blocks.expect("train", next(others, ()))
        read(*args)

    monkeypatch.setattr(blocks, "_read", dropped_before_it_is_read)
    assert np.array_equal(dataset.tokens("train", 0, 64), expected)


def test_one_flipped_bit_is_noticed_and_the_shard_named(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "set", 1500)
    shard = tmp_path / "set/train/shards/00000001.arrow"
    content = bytearray(shard.read_bytes())
    content[dataset.part("train", 0).block(1, 1).start + 100] ^= 1
    shard.write_bytes(content)
    damaged = Dataset.open(dataset.path)
    assert len(damaged.tokens("train", 0, 64 * 4)) == 64 * 4
    with pytest.raises(DataError, match=r"train/shards/00000001\.arrow: corrupt shard"):
        damaged.tokens("train", 0, damaged.num_tokens("train"))


def test_truncated_and_missing_shards_are_named_before_they_are_needed(make_dataset: MakeDataset) -> None:
    dataset = make_dataset()
    dataset.check_stored()
    shard = Path(dataset.path) / "held_out/shards/00000000.arrow"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"held_out/shards/00000000\.arrow: truncated"):
        Dataset.open(dataset.path).check_stored()
    shard.unlink()
    with pytest.raises(DataError, match=r"held_out/shards/00000000\.arrow: missing shard"):
        Dataset.open(dataset.path).check_stored()


def test_a_shard_of_another_type_of_tokens_is_refused(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "set", 64 * 3)
    content, starts = token_shard_bytes([np.arange(64, dtype=np.uint32)] * 3, np.uint32)
    (tmp_path / "set/train/shards/00000000.arrow").write_bytes(content)
    (entry,) = entries_of(dataset)
    changed = dataclasses.replace(
        entry, num_bytes=len(content), block_starts=starts, block_hashes=block_hashes(content, starts)
    )
    rewrite_index(dataset, [changed])
    with pytest.raises(DataError, match=r"a shard of tokens: uint32.*needs tokens: uint16"):
        Dataset.open(dataset.path).check_stored()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"path": "train/shards/../../secret.arrow"}, "leaves the dataset"),
        ({"path": "/etc/passwd"}, "not a plain path"),
        ({"path": "train\\x.arrow"}, "not a plain path"),
        ({"path": "held_out/shards/00000000.arrow"}, "not of the form train/shards/NAME.arrow"),
        ({"num_tokens": -5}, "a number that cannot be"),
        ({"num_bytes": 0}, "cannot be"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_index_that_cannot_be_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    dataset = write_dataset(tmp_path / "set", 64 * 2)
    (entry,) = entries_of(dataset)
    rewrite_index(dataset, [dataclasses.replace(entry, **change)])
    with pytest.raises(DataError, match=says):
        Dataset.open(dataset.path).tokens("train", 0, 1)


def test_sums_must_agree_and_shards_be_named_once(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "set", 1500)
    entries = entries_of(dataset)
    rewrite_index(dataset, entries, num_tokens=1400)
    with pytest.raises(DataError, match=r"000000\.parquet: Totals.*index\.parquet says"):
        Dataset.open(dataset.path).tokens("train", 0, 1)
    rewrite_index(dataset, [entries[0], *entries])
    with pytest.raises(DataError, match="names a shard twice"):
        Dataset.open(dataset.path).tokens("train", 0, 1)


def test_an_index_of_another_dataset_is_refused(tmp_path: Path) -> None:
    one, other = write_dataset(tmp_path / "one", 1500), write_dataset(tmp_path / "other", 1500, block_tokens=32)
    for name in (part_name("train", 0), root_name("train")):
        (Path(one.path) / name).write_bytes((Path(other.path) / name).read_bytes())
        with pytest.raises(DataError, match=r"does not belong|dataset\.json says"):
            Dataset.open(one.path).tokens("train", 0, 1)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("dataset.json", b"{", "damaged manifest"),
        ("dataset.json", b'{"format_version": 2}', "damaged manifest"),
        ("dataset.json", b'{"format_version": 99}', "format version 99"),
        ("train/index.parquet", b"PAR1", "not an index"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    dataset = write_dataset(tmp_path / "set", 100)
    (Path(dataset.path) / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}.*{says}"):
        Dataset.open(dataset.path)


@pytest.mark.parametrize("tokens", [[-1], [1000], [float("nan")], [1.5]])
def test_tokens_outside_the_vocabulary_are_not_written(tmp_path: Path, tokens: list[float]) -> None:
    facts = DatasetFacts(tokenizer_sha256="t", vocab_size=1000, end_of_text_id=0, held_out_fraction=0.1)
    with pytest.raises(ValueError, match=r"document doc: tokens .*(must be in \[0, 1000\)|must be whole numbers)"):
        DatasetWriter(Store.open(tmp_path), facts).add("train", "doc", "file", np.array(tokens))


def test_a_dataset_is_read_by_uri_too(make_dataset: MakeDataset) -> None:
    dataset = make_dataset()
    by_uri = Dataset.open(f"file://{dataset.path}")
    assert by_uri.tokens("train", 0, 100).tolist() == dataset.tokens("train", 0, 100).tolist()
    assert by_uri.path == f"file://{dataset.path}"
    with pytest.raises(DataError, match="unknown scheme 'nonsense://'"):
        Dataset.open("nonsense://somewhere")


def test_the_same_text_gives_the_same_identity(tmp_path: Path, tokenizer_path: Path) -> None:
    text = tmp_path / "texts"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"text {number} " * 30)
    tokenizer = Tokenizer.load(tokenizer_path)
    one, other = (prepare([str(text)], tmp_path / name, tokenizer, held_out_fraction=0.2) for name in ("a", "b"))
    assert one.identity == other.identity
    changed = prepare([str(text)], tmp_path / "c", tokenizer, held_out_fraction=0.2, block_tokens=100)
    assert changed.identity != one.identity
