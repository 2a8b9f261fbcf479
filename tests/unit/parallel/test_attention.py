from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.attention import attend_causally, chunks_of_rank, places_of_chunks
from parallel.norm import RMSNorm


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Softmax attention written out, in float64."""
    query, key, value = (tensor.double() for tensor in (query, key, value))
    shared = query.size(1) // key.size(1)
    key, value = (tensor.repeat_interleave(shared, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.size(-1))
    places = torch.arange(key.size(2))
    seen = places[None, :] <= places[key.size(2) - query.size(2) :, None]
    return scores.masked_fill(~seen, -math.inf).softmax(-1) @ value


@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("num_queries", [12, 4, 1])
def test_queries_attend_to_what_is_not_after_them_and_share_keys(key_heads, num_queries):
    torch.manual_seed(0)
    query = torch.randn(2, 6, num_queries, 8)
    key, value = torch.randn(2, 2, key_heads, 12, 8).unbind(0)
    output = attend_causally(query, key, value, 1 / math.sqrt(8))
    torch.testing.assert_close(output.double(), reference(query, key, value), atol=1e-6, rtol=1e-5)


@given(st.integers(1, 16))
def test_zigzag_gives_every_chunk_to_one_rank_and_equal_work_to_all(size):
    held = [chunks_of_rank(rank, size) for rank in range(size)]
    flat = [chunk for chunks in held for chunk in chunks]
    assert [flat[place] for place in places_of_chunks(size)] == list(range(2 * size))
    assert len({sum(chunks) for chunks in held}) == 1


def test_norm_divides_by_the_root_mean_square():
    norm = RMSNorm(SimpleNamespace(params_dtype=torch.float32, sequence_parallel=True), 5, eps=1e-3)
    torch.nn.init.uniform_(norm.weight)
    hidden = torch.randn(3, 5)
    expected = hidden * (hidden.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * norm.weight
    torch.testing.assert_close(norm(hidden), expected)
    assert norm.weight.sequence_parallel is True
