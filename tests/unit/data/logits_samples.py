"""What a teacher says of sixteen samples, made up."""

import numpy as np

from data.logits import Likeliest, LogitsManifest

TOKENS, TOP_K, VOCABULARY = 6, 4, 300
ABOUT = {"tokenizer": "abc", "data": {"business": "123"}, "sequence_length": TOKENS}
MANIFEST = LogitsManifest(
    format_version=1,
    about=ABOUT,
    vocab_size=VOCABULARY,
    tokens=TOKENS,
    top_k=TOP_K,
    stored_as="fp32",
    num_samples=16,
)


def said(num_samples=16):
    random = np.random.default_rng(0)
    ids = random.integers(VOCABULARY, size=(num_samples, TOKENS, TOP_K))
    return Likeliest(ids, -random.exponential(size=ids.shape).astype(np.float32))
