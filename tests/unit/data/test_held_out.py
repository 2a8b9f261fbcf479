from __future__ import annotations

import numpy as np
import pytest
from conftest import MakeDataset

from data.held_out import PADDING_ID, held_out_batches, held_out_documents
from data.shards import Access, Dataset


def scored_text(dataset: Dataset, data_size: int, **settings: int) -> dict[int, list[int]]:
    """Counted labels by document, over all ranks."""
    text: dict[int, list[int]] = {}
    for data_rank in range(data_size):
        for batch in held_out_batches(dataset, data_rank=data_rank, data_size=data_size, **settings):
            for row, number in enumerate(batch.sample_ids_B.tolist()):
                counted = batch.labels_BS[row][batch.loss_mask_BS[row] == 1]
                text.setdefault(number, []).extend(counted.tolist())
    return text


@pytest.mark.parametrize("data_size", [1, 2, 3, 8])
@pytest.mark.parametrize("tokens", [1, 100, 400, 10**6])
def test_every_token_of_the_chosen_documents_is_scored_once(
    make_dataset: MakeDataset, data_size: int, tokens: int
) -> None:
    dataset = make_dataset()
    text = scored_text(dataset, data_size, tokens=tokens, sequence_length=16, micro_batch=4)
    assert text.pop(PADDING_ID, []) == []
    expected = {
        document.number: dataset.tokens("held_out", document.first_token, document.num_tokens).tolist()
        for document in held_out_documents(dataset, tokens)
    }
    assert text == expected
    assert sum(map(len, text.values())) == min(tokens, dataset.num_tokens("held_out"))


def test_only_the_last_document_is_cut_and_more_tokens_add_to_the_same_documents(make_dataset: MakeDataset) -> None:
    dataset = make_dataset()
    few, many = held_out_documents(dataset, 150), held_out_documents(dataset, 400)
    assert [document.number for document in few] == [document.number for document in many][: len(few)]
    for document in few[:-1]:
        assert dataset.tokens("held_out", document.first_token + document.num_tokens - 1, 1) == dataset.end_of_text_id
    everything = held_out_documents(dataset, 10**6)
    assert sorted(document.number for document in everything) == list(range(dataset.num_documents("held_out")))


@pytest.mark.parametrize("data_size", [1, 2, 5])
def test_every_rank_has_equally_many_batches_of_one_shape(make_dataset: MakeDataset, data_size: int) -> None:
    dataset = make_dataset()
    ranks = [
        held_out_batches(dataset, tokens=300, sequence_length=16, micro_batch=4, data_rank=rank, data_size=data_size)
        for rank in range(data_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    for batches in ranks:
        for batch in batches:
            assert batch.tokens_BS.shape == batch.labels_BS.shape == batch.loss_mask_BS.shape == (4, 16)
            assert (batch.loss_mask_BS[batch.sample_ids_B == PADDING_ID] == 0).all()


def test_rows_follow_one_another_from_end_of_text(make_dataset: MakeDataset) -> None:
    dataset = make_dataset()
    (document, *_) = held_out_documents(dataset, 10**6)
    (batch, *_) = held_out_batches(dataset, tokens=10**6, sequence_length=8, micro_batch=2)
    tokens = dataset.document("held_out", document.number).tokens.tolist()
    assert batch.tokens_BS[0].tolist() == [dataset.end_of_text_id, *tokens[:7]]
    assert batch.labels_BS[0].tolist() == tokens[:8]
    assert batch.tokens_BS[1][0] == tokens[7]
    assert np.array_equal(batch.position_ids_BS, [range(8)] * 2)


def test_a_rank_reads_each_table_and_each_block_of_its_share_once(make_dataset: MakeDataset) -> None:
    made = make_dataset(num_documents=600)
    num_blocks = -(-made.num_tokens("held_out") // made.manifest.block_tokens)
    num_tables, num_kept = made.num_shards("held_out"), num_blocks // 2
    dataset = Dataset.open(made.path, Access(cache_bytes=num_kept * made.block_bytes))
    opened = dataset.store.counters.requests
    held_out_batches(dataset, tokens=10**6, sequence_length=64, micro_batch=1)
    # With a part of the index.
    whole = dataset.store.counters.requests - opened
    assert whole <= 1 + num_tables + num_blocks
    held_out_batches(dataset, tokens=2000, sequence_length=64, micro_batch=1, data_rank=3, data_size=64)
    assert dataset.store.counters.requests - opened - whole <= num_tables + 2


def test_no_tokens_is_refused(make_dataset: MakeDataset) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        held_out_documents(make_dataset(), 0)
