from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from conftest import MakeDataset
from hypothesis import given
from hypothesis import strategies as st

from conf.errors import DataError
from conf.schema import ShuffleConfig
from data import rows as rows_module
from data.batch import Batch, attended_length, positions_in_documents
from data.index import GROUP_BLOCKS
from data.samples import StreamSpec
from data.shards import Access, Dataset
from data.stream import Stream

LENGTH = 16
BATCH = 192


def stream_of(datasets: dict[str, Dataset], **changes: object) -> Stream:
    settings = {
        "mixtures": [(0, dict.fromkeys(datasets, 1.0))],
        "seed": 5,
        "sequence_length": LENGTH,
        "global_batch": BATCH,
        "micro_batch": 3,
        "shuffle": ShuffleConfig(lanes=8),
    }
    return Stream(datasets, StreamSpec(**{**settings, **changes}))  # type: ignore[arg-type]


@pytest.fixture
def two(make_dataset: MakeDataset) -> dict[str, Dataset]:
    return {"one": make_dataset("one"), "other": make_dataset("other", num_documents=100)}


@pytest.mark.parametrize("data_size", [1, 2, 4, 8, 64])
def test_the_global_batch_is_the_same_for_every_data_size(two: dict[str, Dataset], data_size: int) -> None:
    stream = stream_of(two, reset_at_documents=True)
    whole = stream.batches(7, 0, 1)
    shared = [batch for data_rank in range(data_size) for batch in stream.batches(7, data_rank, data_size)]
    assert len(shared) == BATCH // 3
    for field in ("tokens_BS", "labels_BS", "position_ids_BS", "sample_ids_B"):
        expected = np.concatenate([getattr(batch, field) for batch in whole])
        assert np.array_equal(np.concatenate([getattr(batch, field) for batch in shared]), expected)


@pytest.mark.parametrize("data_size", [1, 2, 3, 4, 8, 64])
def test_every_sample_is_seen_once_an_epoch_whatever_the_data_size(make_dataset: MakeDataset, data_size: int) -> None:
    # Every data rank plans for itself: many of them see fewer documents, for time's sake.
    stream = stream_of({"one": make_dataset(num_documents=100 if data_size <= 8 else 20)}, micro_batch=1)
    size = stream.samples_in_epoch("one")
    seen = []
    for step in range(-(-2 * size // BATCH)):
        for data_rank in range(data_size):
            for batch in stream.batches(step, data_rank, data_size):
                seen += stream.samples(batch.sample_ids_B)
    for epoch in (0, 1):
        indices = [sample.first_token for sample in seen if sample.epoch == epoch]
        assert sorted(indices) == list(range(0, size * LENGTH, LENGTH))
    orders = [[sample.first_token for sample in seen if sample.epoch == epoch] for epoch in (0, 1)]
    assert orders[0] != orders[1]


def test_a_fresh_stream_goes_on_where_another_stopped(two: dict[str, Dataset]) -> None:
    reading = stream_of(two)
    traces = [np.concatenate([batch.tokens_BS for batch in reading.batches(step, 0, 1)]) for step in range(5)]
    for step in (4, 0, 3):
        fresh = stream_of(two).batches(step, 0, 1)
        assert np.array_equal(np.concatenate([batch.tokens_BS for batch in fresh]), traces[step])


def test_what_the_first_step_needs_is_read_before_all_else(
    make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset()
    stream = stream_of({"one": dataset}, global_batch=2, micro_batch=1, shuffle=ShuffleConfig(lanes=2, window_blocks=2))
    needed = {block for _, block in stream.blocks(3)}
    asked: list[set[int]] = []
    for name in ("fetch", "expect"):
        method = getattr(dataset, name)
        monkeypatch.setattr(
            dataset, name, lambda split, numbers, method=method: (asked.append(set(numbers)), method(split, numbers))
        )
    stream.rows(3, 0, 2)
    assert asked == [needed, needed]
    requests = dataset.store.counters.requests
    stream.rows(4, 0, 2)
    assert len(asked) > 2, "others are read ahead with the step that is asked for next"
    later = set().union(*asked[2:]) - needed
    dataset.fetch("train", sorted(later | needed))
    assert 0 < dataset.store.counters.requests - requests <= len(later), "and what was read is not read again"


def test_each_source_keeps_what_is_mixed_of_it_and_no_more(make_dataset: MakeDataset) -> None:
    paths = {name: make_dataset(name, num_documents=200, block_tokens=64).path for name in ("one", "other", "third")}
    datasets = {name: Dataset.open(path, Access(cache_bytes=0)) for name, path in paths.items()}
    shuffle = ShuffleConfig(lanes=2, window_blocks=8, readahead_blocks=4)
    stream = stream_of(datasets, global_batch=12, shuffle=shuffle)
    for step in range(100):
        stream.rows(step, 0, 12)
    for dataset in datasets.values():
        assert len(dataset._blocks) <= 2 * 8 * 5 // 4 + 4 + GROUP_BLOCKS


def test_blocks_that_lie_together_are_read_together_wherever_places_are_worked_out(
    make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "PLANNED_SAMPLES", 512)
    dataset = make_dataset(num_documents=1000, block_tokens=512)
    stream = stream_of({"one": dataset}, global_batch=12, shuffle=ShuffleConfig(lanes=4, window_blocks=4))
    first = len(stream.blocks(0))
    opened = dataset.store.counters.requests
    for step in range(stream.samples_in_epoch("one") // 12):
        stream.rows(step, 0, 12)
    num_blocks = stream.samples_in_epoch("one") * LENGTH // 512
    assert num_blocks > 80
    # A group each, the blocks of the first step before, and a part of the index.
    assert dataset.store.counters.requests - opened <= num_blocks // GROUP_BLOCKS + first + 1


@pytest.mark.parametrize("length", [61, 65, 100, 129, 200])
def test_sequences_that_fit_blocks_badly_are_all_seen(make_dataset: MakeDataset, length: int) -> None:
    dataset = make_dataset(block_tokens=64)
    shuffle = ShuffleConfig(lanes=2, window_blocks=2)
    stream = stream_of({"one": dataset}, sequence_length=length, global_batch=2, micro_batch=1, shuffle=shuffle)
    size = stream.samples_in_epoch("one")
    assert size * length > 0.9 * dataset.num_tokens("train")
    _, epochs, first_tokens = stream.locate(np.arange(2 * size + 8))
    assert len(set(first_tokens[epochs == 0].tolist())) == (epochs == 0).sum() == size
    assert 0 <= first_tokens.min() and first_tokens.max() + length < dataset.num_tokens("train")


def test_steps_consume_consecutive_positions(two: dict[str, Dataset]) -> None:
    stream = stream_of(two)
    ids = np.concatenate([stream.sample_ids(step) for step in range(4)])
    assert ids.tolist() == list(range(4 * BATCH))


def test_the_mixture_holds_in_every_step_and_a_finished_source_begins_again(two: dict[str, Dataset]) -> None:
    stream = stream_of(two, mixtures=[(0, {"one": 3, "other": 1})])
    samples = [sample for step in range(6) for sample in stream.samples(stream.sample_ids(step))]
    for step in range(6):
        assert Counter(sample.source for sample in samples[step * BATCH : (step + 1) * BATCH]) == {
            "one": BATCH * 3 // 4,
            "other": BATCH // 4,
        }
    epochs = Counter(sample.epoch for sample in samples if sample.source == "one")
    assert epochs[0] == stream.samples_in_epoch("one") and epochs[1] > 0


def test_a_sample_is_its_window_of_text_and_labels_follow_tokens(two: dict[str, Dataset]) -> None:
    stream = stream_of(two)
    (batch, *_) = stream.batches(2, 1, 2)
    for row, sample in enumerate(stream.samples(batch.sample_ids_B)):
        window = two[sample.source].tokens("train", sample.first_token, LENGTH + 1)
        assert batch.tokens_BS[row].tolist() == window[:-1].tolist()
        assert batch.labels_BS[row].tolist() == window[1:].tolist()
    assert (batch.loss_mask_BS == 1).all()
    assert (batch.position_ids_BS == np.arange(LENGTH)).all()
    assert batch.tokens_BS.dtype == batch.labels_BS.dtype == np.int64


def test_positions_begin_anew_with_every_document_when_asked(two: dict[str, Dataset]) -> None:
    plain, stream = stream_of(two), stream_of(two, reset_at_documents=True)
    # The index knows where documents end without looking at tokens.
    tables = {name: dataset.documents("train", 0) for name, dataset in two.items()}
    last_tokens = {
        name: set((np.add(table["first_token"].to_numpy(), table["num_tokens"].to_numpy()) - 1).tolist())
        for name, table in tables.items()
    }
    joined, requests = plain.batches(2, 0, 1), plain.counters()[0]["requests"]
    apart = stream.batches(2, 0, 1)
    assert stream.counters()[0]["requests"] == requests, "both read the same datasets, and nothing was left to read"
    num_documents = 0
    for before, batch in zip(joined, apart, strict=True):
        for field in ("tokens_BS", "labels_BS", "loss_mask_BS", "sample_ids_B"):
            assert np.array_equal(getattr(batch, field), getattr(before, field))
        expected = []
        for sample in stream.samples(batch.sample_ids_B):
            # A document is begun by the end-of-text token before it, as where held-out documents are scored.
            begins = [sample.first_token + place in last_tokens[sample.source] for place in range(LENGTH)]
            starts = [0, *(place for place in range(1, LENGTH) if begins[place])]
            expected.append([place - max(start for start in starts if start <= place) for place in range(LENGTH)])
        assert batch.position_ids_BS.tolist() == expected
        num_documents += len(batch.cumulative_lengths) - 1
    assert num_documents > BATCH + 20, "some rows hold several"


@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4))
def test_documents_of_a_batch_partition_its_rows(starts: list[list[bool]]) -> None:
    positions = positions_in_documents(np.array(starts))
    batch = Batch(positions, positions, np.ones(positions.shape, np.float32), positions, np.arange(len(starts)))
    bounds = batch.cumulative_lengths
    assert bounds[0] == 0 and bounds[-1] == positions.size and bounds.dtype == np.int32
    pieces = np.split(positions.reshape(-1), bounds[1:-1])
    assert all(piece.tolist() == list(range(len(piece))) for piece in pieces)
    assert set(range(0, positions.size, 7)) <= set(bounds.tolist())
    # What the FLOPs of causal attention follow: query-key pairs within documents.
    pairs = sum(1 for piece in pieces for query in range(len(piece)) for key in range(len(piece)))
    assert attended_length([batch]) == pytest.approx(pairs / positions.size)


def test_the_documents_of_a_step_are_those_its_tokens_are_of(two: dict[str, Dataset]) -> None:
    stream = stream_of(two)
    documents = stream.documents(3)
    assert list(documents) == stream.sample_ids(3).tolist()
    for sample in stream.samples(stream.sample_ids(3))[:20]:
        expected = two[sample.source].document_ids("train", sample.first_token, LENGTH + 1)
        assert documents[sample.id] == expected and expected


def test_seeds_change_the_order(two: dict[str, Dataset]) -> None:
    orders = [
        [(sample.source, sample.first_token) for sample in stream_of(two, seed=seed).samples(np.arange(BATCH))]
        for seed in (5, 6, 5)
    ]
    assert orders[0] == orders[2] != orders[1]


def test_what_cannot_be_served_is_refused(two: dict[str, Dataset]) -> None:
    with pytest.raises(DataError, match=r"source 'one'.* training tokens; one sample of sequence_length=1000000"):
        stream_of(two, sequence_length=1_000_000)
    with pytest.raises(DataError, match="names source 'third'; there is: one, other"):
        stream_of(two, mixtures=[(0, {"third": 1.0})])
    with pytest.raises(ValueError, match="must be a multiple of 15"):
        stream_of(two).batches(0, 0, 5)
    with pytest.raises(ValueError, match="data rank 2 of 2"):
        stream_of(two).batches(0, 2, 2)
