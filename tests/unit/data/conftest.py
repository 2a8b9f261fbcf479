from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers

from data.prepare import prepare
from data.shards import Dataset
from data.tokenizer import Tokenizer

MakeDataset = Callable[..., Dataset]


def write_tokenizer(path: Path, words: tuple[str, ...] = ()) -> Path:
    """A byte-level tokenizer: end-of-text, 256 bytes and some words of their own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(["<|endoftext|>", *alphabet, *words])}
    tokenizer = HuggingFaceTokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))
    return path


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text(
        "".join(json.dumps({"id": f"doc{number}", "text": text}) + "\n" for number, text in enumerate(texts))
    )
    return path


@pytest.fixture
def tokenizer_path(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "tokenizer.json")


@pytest.fixture
def make_dataset(tmp_path: Path, tokenizer_path: Path) -> MakeDataset:
    """Prepares numbered documents: a few hundred tokens each, in several blocks a split."""

    def make(name: str = "dataset", num_documents: int = 60, block_tokens: int = 600) -> Dataset:
        texts = [
            f"{name} {number} " + f"{number * 7919 % 1000} words " * (1 + number % 9) for number in range(num_documents)
        ]
        source = write_jsonl(tmp_path / f"{name}.jsonl", texts)
        return prepare(
            [str(source)],
            tmp_path / name,
            Tokenizer.load(tokenizer_path),
            held_out_fraction=0.2,
            block_tokens=block_tokens,
        )

    return make
