"""A dataset of random tokens and a stream over it, for tests of what lies between storage and batches."""

from __future__ import annotations

from typing import Any

import numpy as np

from conf.schema import ShuffleConfig
from data.samples import StreamSpec
from data.shards import Dataset
from data.storage import Store
from data.stream import Stream
from data.writer import DatasetFacts, DatasetWriter

VOCABULARY = 5000


def write_dataset(store: Store, *, num_documents: int, document_tokens: int, **facts: int) -> None:
    """Documents of so many tokens, end-of-text included, and a held-out one; `facts` are sizes of blocks and shards."""
    settings: dict[str, Any] = {"tokenizer_sha256": "t", "vocab_size": VOCABULARY, "end_of_text_id": 0}
    writer = DatasetWriter(store, DatasetFacts(**settings, held_out_fraction=0.1, **facts))
    random = np.random.default_rng(3)
    for number in range(num_documents):
        writer.add("train", f"doc{number}", "input", random.integers(1, VOCABULARY, document_tokens - 1))
    writer.add("held_out", "other", "input", np.arange(1, 20))
    writer.finish(num_duplicates=0, inputs=[])


def stream_over(dataset: Dataset, **spec: Any) -> Stream:
    """Short rows of two lanes, or as `spec` says."""
    settings: dict[str, Any] = {
        "sequence_length": 64,
        "global_batch": 4,
        "micro_batch": 1,
        "shuffle": ShuffleConfig(lanes=2, window_blocks=2),
    }
    return Stream({"one": dataset}, StreamSpec(mixtures=[(0, {"one": 1.0})], seed=1, **(settings | spec)))
