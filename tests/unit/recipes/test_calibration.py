"""Calibration text is never text that models are judged by."""

from types import SimpleNamespace

import numpy as np
import pytest
from check_samples import rehearsal

from conf.errors import DataError
from data.samples import Sample
from data.shards import Dataset
from data.storage import Store
from data.writer import DatasetFacts, DatasetWriter
from recipes.calibration import refuse_overlap


class Windows:
    """As much of a Stream: every window of the corpus."""

    spec = SimpleNamespace(sequence_length=16)

    def sample_ids(self, step):
        return np.arange(7)

    def samples(self, ids):
        return [Sample(int(number), "business", 0, 16 * int(number)) for number in ids]


def overlap(path, held_out):
    """Three documents of 40 tokens to train on, and one that is held out, each named by its first token."""
    facts = DatasetFacts(
        tokenizer_sha256="0" * 64,
        vocab_size=500,
        end_of_text_id=0,
        held_out_fraction=0.1,
        block_tokens=32,
        shard_blocks=2,
    )
    writer = DatasetWriter(Store.open(path), facts)
    for split, first in [("train", 1), ("train", 101), ("train", 201), ("held_out", held_out)]:
        writer.add(split, f"{split}-{first}", "here", np.arange(first, first + 39))
    writer.finish(num_duplicates=0, inputs=[])
    config = rehearsal(order=("specialise", "prune", "evaluate"), stages__evaluate__sources=("business",))
    refuse_overlap(config, {"business": Dataset.open(path)}, Windows())


def test_a_document_that_is_also_evaluated_on_is_refused_by_hash(tmp_path):
    with pytest.raises(DataError, match=r"business: train-101 is also evaluated on, as business: held_out-101"):
        overlap(tmp_path, 101)


def test_other_documents_pass(tmp_path):
    overlap(tmp_path, 301)
