"""Held-out text in a fixed form: the same documents and the same tokens for every model, layout and baseline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from conf.errors import DataError
from data.batch import Batch
from data.index import FORGOTTEN_ID, Split
from data.order import key_of, permuted
from data.shards import Dataset, DocumentPlace

PADDING_ID = -1
"""Sample id of a row that is there only to fill its batch."""
AHEAD_TEXTS = 16
"""Texts that are asked for before they are needed."""


def held_out_documents(dataset: Dataset, tokens: int) -> list[DocumentPlace]:
    """Held-out documents to score: whole, in a fixed random order, the last one cut where `tokens` are reached.

    Raises:
        DataError: the dataset has no held-out documents, or what it says of them is damaged.
        ValueError: `tokens` is not above 0.
    """
    if tokens < 1:
        raise ValueError(f"{tokens} held-out tokens: there must be at least 1")
    num_documents = dataset.num_documents("held_out")
    if not num_documents:
        raise DataError(f"{dataset.path}: no held-out documents. Prepare it with a larger held-out fraction.")
    chosen: list[DocumentPlace] = []
    seen, key = 0, key_of("held out")
    while tokens and seen < num_documents:
        # A tenth more than that is on average, for each look goes through the tables of all shards.
        more = 16 + 11 * tokens * num_documents // (10 * dataset.num_tokens("held_out"))
        places = np.arange(seen, min(seen + more, num_documents), dtype=np.int64)
        seen += len(places)
        for document in dataset.places("held_out", permuted(places, num_documents, key).tolist()):
            if document.id != FORGOTTEN_ID and tokens:
                chosen.append(replace(document, num_tokens=min(document.num_tokens, tokens)))
                tokens -= chosen[-1].num_tokens
    return chosen


def texts_in_place(
    dataset: Dataset, split: Split, ranges: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Tokens [first, first + count) of a split for each range, read in the order they are stored in, each block once.

    Returns:
        Each range's place among those given, and its tokens.

    Raises:
        DataError: a shard is missing or damaged.
    """
    size = dataset.manifest.block_tokens
    order = sorted(range(len(ranges)), key=lambda place: ranges[place])
    expected = -1
    for at, place in enumerate(order):
        for first, count in (ranges[later] for later in order[at : at + AHEAD_TEXTS]):
            last = max(first, first + count - 2) // size
            if last > expected:
                dataset.expect(split, range(max(first // size, expected + 1), last + 1))
                expected = last
        # A copy, which does not keep the block.
        yield place, dataset.tokens(split, *ranges[place]).astype(np.int64)


def held_out_batches(
    dataset: Dataset, *, tokens: int, sequence_length: int, micro_batch: int, data_rank: int = 0, data_size: int = 1
) -> list[Batch]:
    """The rows that score `held_out_documents`, every batch of every rank of one shape.

    Each document stands in rows of its own after an end-of-text token, so each of its tokens is predicted once.
    `sample_ids_B` is the document's number in the held-out split; rows with `PADDING_ID` and places whose loss mask is
    0 are filled with end-of-text.

    Args:
        dataset: whose held-out documents.
        tokens: to score, at most.
        sequence_length: tokens of a row.
        micro_batch: rows of a batch.
        data_rank: whose share; the rows of ranks 0, 1, 2, ... follow one another.
        data_size: ranks the rows are shared by; each gets equally many batches.

    Raises:
        DataError: the dataset has no held-out documents, or a shard is damaged.
        ValueError: `tokens` is not above 0.
    """
    end_of_text = dataset.end_of_text_id
    # Of each row: the document, and the first of its tokens that the row predicts.
    rows = [
        (document, start)
        for document in held_out_documents(dataset, tokens)
        for start in range(0, document.num_tokens, sequence_length)
    ]
    per_rank = -(-len(rows) // (micro_batch * data_size)) * micro_batch
    mine = rows[data_rank * per_rank : (data_rank + 1) * per_rank]
    texts = [(np.full(1, end_of_text, np.int64), PADDING_ID)] * per_rank
    # The token before a document ends another one, or there is none: it is put there.
    ranges = [
        (document.first_token + start - bool(start), min(sequence_length, document.num_tokens - start) + bool(start))
        for document, start in mine
    ]
    for place, text in texts_in_place(dataset, "held_out", ranges):
        document, start = mine[place]
        texts[place] = (text if start else np.concatenate([[end_of_text], text]), document.number)
    firsts = range(0, per_rank, micro_batch)
    return [_batch(texts[first : first + micro_batch], sequence_length, end_of_text) for first in firsts]


def _batch(rows: list[tuple[npt.NDArray[np.int64], int]], length: int, end_of_text: int) -> Batch:
    windows = np.full((len(rows), length + 1), end_of_text, np.int64)
    mask = np.zeros((len(rows), length), np.float32)
    for row, (text, _) in enumerate(rows):
        windows[row, : len(text)] = text
        mask[row, : len(text) - 1] = 1.0
    return Batch(
        tokens_BS=np.ascontiguousarray(windows[:, :-1]),
        labels_BS=np.ascontiguousarray(windows[:, 1:]),
        loss_mask_BS=mask,
        position_ids_BS=np.tile(np.arange(length, dtype=np.int64), (len(rows), 1)),
        sample_ids_B=np.array([number for _, number in rows], np.int64),
    )
