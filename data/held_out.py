"""Held-out text in a fixed form: the same documents and the same tokens for every model, layout and baseline."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from conf.errors import DataError
from data.batch import Batch
from data.index import FORGOTTEN_ID
from data.order import key_of, permuted
from data.shards import Dataset, TokenDocument

PADDING_ID = -1
"""Sample id of a row that is there only to fill its batch."""


def held_out_documents(dataset: Dataset, tokens: int) -> list[TokenDocument]:
    """Held-out documents to score: whole, in a fixed random order, the last one cut where `tokens` are reached.

    Raises:
        DataError: the dataset has no held-out documents, or a shard is damaged.
        ValueError: `tokens` is not above 0.
    """
    if tokens < 1:
        raise ValueError(f"{tokens} held-out tokens: there must be at least 1")
    num_documents = dataset.num_documents("held_out")
    if not num_documents:
        raise DataError(f"{dataset.path}: no held-out documents. Prepare it with a larger held-out fraction.")
    order = permuted(np.arange(num_documents, dtype=np.int64), num_documents, key_of("held out"))
    chosen: list[TokenDocument] = []
    for number in order.tolist():
        document = dataset.document("held_out", number)
        if document.id == FORGOTTEN_ID:
            continue
        chosen.append(TokenDocument(document.number, document.id, document.tokens[:tokens]))
        tokens -= len(chosen[-1].tokens)
        if not tokens:
            break
    return chosen


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
    rows: list[tuple[npt.NDArray[np.int64], int]] = []
    for document in held_out_documents(dataset, tokens):
        text = np.concatenate([[end_of_text], document.tokens]).astype(np.int64)
        starts = range(0, len(text) - 1, sequence_length)
        rows += [(text[start : start + sequence_length + 1], document.number) for start in starts]
    per_rank = -(-len(rows) // (micro_batch * data_size)) * micro_batch
    mine = rows[data_rank * per_rank : (data_rank + 1) * per_rank]
    mine += [(np.full(1, end_of_text, np.int64), PADDING_ID)] * (per_rank - len(mine))
    firsts = range(0, per_rank, micro_batch)
    return [_batch(mine[first : first + micro_batch], sequence_length, end_of_text) for first in firsts]


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
