"""What a teacher said, written down by any number of ranks and read again by sample id."""

import json
from dataclasses import replace

import numpy as np
import pytest
from logits_samples import ABOUT, MANIFEST, said

from conf.errors import DataError
from data import logits
from data.logits import Likeliest, LogitsWriter, StoredLogits, finish, whole_chunks
from data.storage import Store


def write(path, manifest=MANIFEST, num_ranks=2):
    """Two steps of eight samples, of which each rank has a share; a chunk a step."""
    store, everything = Store.open(path), said()
    for step in range(2):
        for rank in range(num_ranks):
            writer = LogitsWriter(store, manifest, rank=rank)
            share = 8 // num_ranks
            first = 8 * step + rank * share
            writer.add(first, Likeliest(*(each[first : first + share] for each in everything)), chunk=step)
            writer.end_chunk(step)
    finish(store, manifest)
    return StoredLogits.open(str(path))


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_what_was_said_is_read_by_sample_whoever_wrote_it(tmp_path, num_ranks):
    stored = write(tmp_path, num_ranks=num_ranks)
    wanted = np.array([3, 15, 0])
    stored.expect(wanted.tolist())
    found = stored.read(wanted)
    for mine, its in zip(found, said(), strict=True):
        assert np.array_equal(mine, its[wanted])
    stored.close()


@pytest.mark.parametrize(("stored_as", "error"), [("fp16", 2**-11), ("bf16", 2**-8)])
def test_half_precision_rounds_values_and_keeps_ids(tmp_path, stored_as, error):
    stored = write(tmp_path, replace(MANIFEST, stored_as=stored_as, vocab_size=1 << 20))
    found, whole = stored.read(np.arange(16)), said()
    assert np.array_equal(found.ids_BSK, whole.ids_BSK)
    exact = whole.log_probabilities_BSK
    assert 0 < np.abs(found.log_probabilities_BSK / exact - 1).max() <= error
    stored.close()


def test_another_tokenizer_dataset_or_length_is_refused(tmp_path):
    stored = write(tmp_path)
    stored.require(ABOUT, num_samples=16)
    for name, other in (("tokenizer", "abd"), ("data", {"business": "124"}), ("sequence_length", 7)):
        with pytest.raises(DataError, match=rf"{name} is .* and should be"):
            stored.require({**ABOUT, name: other}, num_samples=16)
    with pytest.raises(DataError, match="ends after 16 samples"):
        stored.require(ABOUT, num_samples=17)
    with pytest.raises(IndexError):
        stored.read(np.array([16]))


def test_a_damaged_block_and_a_changed_index_are_told(tmp_path):
    stored = write(tmp_path)
    shard = next((tmp_path / "shards").glob("00000001-00001-*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match="corrupt shard"):
        stored.read(np.arange(12, 16))
    part = tmp_path / "index" / "000000.parquet"
    part.write_bytes(part.read_bytes() + b"x")
    with pytest.raises(DataError, match="another sha256"):
        StoredLogits.open(str(tmp_path)).read(np.array([0]))


def test_a_recording_that_was_stopped_is_none_and_goes_on_after_its_last_chunk(tmp_path):
    store, everything = Store.open(tmp_path), said()
    writer = LogitsWriter(store, MANIFEST, rank=0)
    writer.add(0, Likeliest(*(each[:8] for each in everything)), chunk=0)
    writer.end_chunk(0)
    writer.add(8, Likeliest(*(each[8:10] for each in everything)), chunk=1)
    writer.end_chunk(1)  # another rank did not
    with pytest.raises(DataError, match=r"no recording .* kind logits"):
        StoredLogits.open(str(tmp_path))
    with pytest.raises(DataError, match="10 samples of 16"):
        finish(store, MANIFEST)
    assert whole_chunks(store, {0: range(8), 1: range(8, 16)}) == {0}
    again = LogitsWriter(store, MANIFEST, rank=1)
    again.add(8, Likeliest(*(each[8:] for each in everything)), chunk=1)
    again.end_chunk(1)
    finish(store, MANIFEST)
    assert np.array_equal(StoredLogits.open(str(tmp_path)).read(np.arange(16)).ids_BSK, everything.ids_BSK)


def test_shards_are_bounded_and_the_index_has_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(logits, "SHARD_BYTES", 8 * MANIFEST.sample_bytes)
    monkeypatch.setattr(logits, "PART_SAMPLES", 6)
    stored = write(tmp_path, num_ranks=1)
    assert len(json.loads((tmp_path / "logits.json").read_text())["parts"]) == 3
    assert len(list((tmp_path / "shards").iterdir())) == 2
    assert np.array_equal(stored.read(np.arange(16)).ids_BSK, said().ids_BSK)
