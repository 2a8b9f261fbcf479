"""Calibration text is never text that models are judged by."""

from dataclasses import dataclass

import numpy as np
import pytest
from check_samples import rehearsal

from conf.errors import DataError
from data.shards import TokenDocument
from data.stream import Stream
from recipes.calibration import refuse_overlap

DOCUMENTS = [np.arange(start, start + 40, dtype=np.uint16) for start in (0, 100, 200)]


@dataclass
class Corpus:
    """As much of a Dataset as calibration looks at: equal documents in both splits where they are named so."""

    held_out: list[int]
    path: str = "here"

    def num_tokens(self, split):
        return 120

    def num_documents(self, split):
        return len(self.held_out)

    def document(self, split, number):
        place = number if split == "train" else self.held_out[number]
        return TokenDocument(number, f"{split}-{number}", DOCUMENTS[place])

    def document_numbers(self, split, start, count):
        return range(start // 40, (start + count - 1) // 40 + 1)


def overlap(held_out):
    config = rehearsal(order=("specialise", "prune", "evaluate"), stages__evaluate__sources=("business",))
    datasets = {"business": Corpus(held_out)}
    stream = Stream(datasets, mixture={"business": 1.0}, seed=1, sequence_length=16, global_batch=7, micro_batch=7)
    refuse_overlap(config, datasets, stream)


def test_a_document_that_is_also_evaluated_on_is_refused_by_hash():
    with pytest.raises(DataError, match=r"business: train-1 is also evaluated on, as business: held_out-0"):
        overlap([1])


def test_other_documents_pass():
    DOCUMENTS.append(np.arange(300, 340, dtype=np.uint16))
    overlap([3])
