from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import models

from conf.errors import DataError
from data.tokenizer import Tokenizer, tokenizer_file


def test_shipped_tokenizer_has_1024_tokens_and_end_of_text_first() -> None:
    tokenizer = Tokenizer.load("shipped:tokenizer")
    assert (tokenizer.vocab_size, tokenizer.end_of_text_id) == (1024, 0)
    assert tokenizer.decode(np.array([0])) == "<|endoftext|>"


def test_any_text_comes_back_as_it_was() -> None:
    tokenizer = Tokenizer.load("shipped:tokenizer")
    texts = ["", "  def f(x):\n\treturn x\n", "GDP $1,234.5 billion", "na\u00efve \u4e2d\u6587 \U0001f600", " \n\n x "]
    assert [tokenizer.decode(tokens) for tokens in tokenizer.encode(texts)] == texts


def test_a_document_that_spells_end_of_text_does_not_end_there() -> None:
    tokenizer = Tokenizer.load("shipped:tokenizer")
    (tokens,) = tokenizer.encode(["before <|endoftext|> after"])
    assert tokenizer.end_of_text_id not in tokens.tolist()
    assert tokenizer.decode(tokens) == "before <|endoftext|> after"


def test_hash_is_of_the_file(tokenizer_path: Path) -> None:
    one = Tokenizer.load(tokenizer_path)
    assert Tokenizer.load(tokenizer_path.parent).sha256 == one.sha256
    assert one.content == tokenizer_file(tokenizer_path).read_bytes()
    tokenizer_path.write_text(tokenizer_path.read_text() + "\n")
    assert Tokenizer.load(tokenizer_path).sha256 != one.sha256


def test_faults_name_the_file(tmp_path: Path) -> None:
    missing, broken, endless = tmp_path / "missing.json", tmp_path / "broken.json", tmp_path / "endless.json"
    broken.write_text('{"model": 1}')
    HuggingFaceTokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(endless))
    for path, says in (
        (missing, "no tokenizer can be read"),
        (broken, "not a tokenizer"),
        (endless, "no end-of-text token"),
    ):
        with pytest.raises(DataError, match=says) as fault:
            Tokenizer.load(path)
        assert str(path) in str(fault.value)
    with pytest.raises(DataError, match="There is: shipped:tokenizer"):
        Tokenizer.load("shipped:tokeniser")
