"""Calibration text is never text that models are judged by."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from check_samples import rehearsal

from conf.errors import DataError
from data.samples import Sample
from data.shards import TokenDocument
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


class Windows:
    """As much of a Stream: every window of the corpus."""

    spec = SimpleNamespace(sequence_length=16)

    def sample_ids(self, step):
        return np.arange(7)

    def samples(self, ids):
        return [Sample(int(number), "business", 0, 16 * int(number)) for number in ids]


def overlap(held_out):
    config = rehearsal(order=("specialise", "prune", "evaluate"), stages__evaluate__sources=("business",))
    datasets = {"business": Corpus(held_out)}
    refuse_overlap(config, datasets, Windows())


def test_a_document_that_is_also_evaluated_on_is_refused_by_hash():
    with pytest.raises(DataError, match=r"business: train-1 is also evaluated on, as business: held_out-0"):
        overlap([1])


def test_other_documents_pass():
    DOCUMENTS.append(np.arange(300, 340, dtype=np.uint16))
    overlap([3])
