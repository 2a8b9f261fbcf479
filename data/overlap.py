"""Text that a model is judged by, as hashes of its runs of words; training documents that hold such a run are dropped.

A run of 13 words in common is what Brown et al. (2020) call contamination. The whole document is dropped, not only the
passage, and only if it would be trained on: what is held out may well be the text itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from conf.errors import DataError
from conf.schema import StorageConfig
from data.corpora import is_shipped
from data.documents import documents, input_files, normalised
from data.held_out import texts_in_place
from data.index import MANIFEST_NAME
from data.shards import Access, Dataset
from data.storage import Store
from data.tokenizer import Tokenizer
from data.words import Hashes, WordHashes, runs

RUN_WORDS = 13


class Evaluation:
    """Runs of words that must not be trained on.

    Attributes:
        hashes: of the runs, sorted, uint64; each once.
    """

    def __init__(self, hashes: Hashes) -> None:
        self.hashes = hashes

    @classmethod
    def of(cls, texts: Iterable[str]) -> Evaluation:
        """The runs of these texts; a text shorter than a run is one."""
        words = WordHashes()
        found = [runs(words.of(text), RUN_WORDS) for text in texts]
        return cls(np.unique(np.concatenate([np.zeros(0, np.uint64), *found])))

    def overlap(self, words: Hashes) -> int:
        """How many runs of a document, given by the hashes of its words, are among them."""
        found = runs(words, RUN_WORDS)
        if not len(found) or not len(self.hashes):
            return 0
        places = np.minimum(np.searchsorted(self.hashes, found), len(self.hashes) - 1)
        return int((self.hashes[places] == found).sum())


def evaluation_texts(locations: Sequence[str], tokenizer: Tokenizer, storage: StorageConfig, field: str) -> list[str]:
    """The held-out documents of datasets, and all documents of files and folders of text.

    Raises:
        DataError: one is missing or unreadable, or a dataset is of another tokenizer.
    """
    texts: list[str] = []
    for location in locations:
        if is_shipped(location) or not Store.open(location, storage).exists(MANIFEST_NAME):
            files = input_files([location], storage)
            texts += [normalised(document.text) for file in files for document in documents(file, field, storage)]
            continue
        dataset = Dataset.open(location, Access(storage=storage))
        if dataset.tokenizer_sha256 != tokenizer.sha256:
            raise DataError(
                f"{location}: made with another tokenizer, so its held-out documents cannot be read back. "
                "Give their text to --decontaminate, or prepare with that tokenizer."
            )
        found = dataset.places("held_out", range(dataset.num_documents("held_out")))
        ranges = [(document.first_token, document.num_tokens) for document in found]
        texts += [tokenizer.decode(tokens[:-1]) for _, tokens in texts_in_place(dataset, "held_out", ranges)]
        dataset.close()
    return texts
