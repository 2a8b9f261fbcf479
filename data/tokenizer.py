"""Text to token ids and back: a Hugging Face `tokenizer.json` with its hash and its end-of-text token."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers

from conf.errors import DataError
from data.corpora import is_shipped, shipped

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""Names the end of a document goes by, in order of preference."""


def tokenizer_file(location: str | Path) -> Path:
    """The `tokenizer.json` that a location means; it need not exist.

    Args:
        location: path of a `tokenizer.json` or of the folder that holds it, or `shipped:tokenizer`.

    Raises:
        DataError: no tokenizer of that name is shipped.
    """
    if is_shipped(str(location)):
        return shipped(str(location), ".json")
    path = Path(location).expanduser()
    return path / "tokenizer.json" if path.is_dir() else path


class Tokenizer:
    """An immutable tokenizer.

    Attributes:
        content: the bytes of its `tokenizer.json`, to be copied beside an exported model.
        sha256: of `content`; a dataset and a model belong together when theirs are equal.
        vocab_size: ids are below this.
        end_of_text_id: the token that ends every document.
    """

    def __init__(self, content: bytes, name: str) -> None:
        try:
            inner = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the binding raises a bare Exception for any fault in the file
            raise DataError(
                f"{name}: not a tokenizer ({error}). Give a tokenizer.json of Hugging Face tokenizers."
            ) from error
        inner.no_padding()
        inner.no_truncation()
        # A document that happens to spell a special token is text like any other.
        inner.encode_special_tokens = True
        end_of_text_ids = [token_id for token in END_OF_TEXT if (token_id := inner.token_to_id(token)) is not None]
        if not end_of_text_ids:
            raise DataError(f"{name}: has no end-of-text token. One of these must be in it: {', '.join(END_OF_TEXT)}.")
        self._inner = inner
        self.content = content
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.end_of_text_id: int = end_of_text_ids[0]
        self.vocab_size: int = max(inner.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def load(cls, location: str | Path) -> Tokenizer:
        """Read a tokenizer.

        Args:
            location: as in `tokenizer_file`.

        Raises:
            DataError: it is missing or not a tokenizer.
        """
        path = tokenizer_file(location)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"{path}: no tokenizer can be read here ({error.strerror}). Give a tokenizer.json or shipped:tokenizer."
            ) from error
        return cls(content, str(path))

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """Token ids of each text, without an end-of-text token; uses all cores."""
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, tokens: npt.NDArray[np.integer]) -> str:
        """The text of token ids, end-of-text tokens spelled out."""
        text: str = self._inner.decode(tokens.tolist(), skip_special_tokens=False)
        return text
