"""Attention within documents is attention of each document alone, however the rows are cut."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batch import positions_in_documents
from parallel import attention
from parallel.attention import attend_by_lengths, attend_in_documents, attend_one_by_one, chunks_of_rank
from parallel.attention_kernel import TORCH_DECIDES
from parallel.documents import Documents

HEADS, GROUPS, DIM = 4, 2, 8
SCALE = 1 / math.sqrt(DIM)
rows = st.integers(1, 3).flatmap(
    lambda context: st.tuples(
        st.just(context),
        st.integers(1, 3).flatmap(
            lambda parts: st.lists(
                st.lists(st.booleans(), min_size=2 * context * parts, max_size=2 * context * parts),
                min_size=1,
                max_size=3,
            )
        ),
    )
)


def positions_of(starts: list[list[bool]]) -> np.ndarray:
    return positions_in_documents(np.array(starts))


def of_ranks(positions: np.ndarray, context: int) -> list[Documents]:
    if context == 1:
        return [Documents(positions, (0,), 1)]
    return [Documents(positions, chunks_of_rank(rank, context), 2 * context) for rank in range(context)]


def held_by(tensor: torch.Tensor, rank: int, context: int) -> torch.Tensor:
    chunks = tensor.chunk(2 * context)
    return tensor if context == 1 else torch.cat([chunks[chunk] for chunk in chunks_of_rank(rank, context)])


def random_heads(positions: np.ndarray, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    num_rows, length = positions.shape
    return [
        torch.randn(length, num_rows, heads, DIM, dtype=dtype, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS)
    ]


def written_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: np.ndarray) -> torch.Tensor:
    """Softmax attention under the whole mask: a key is seen if it is not after the query and of the same document."""
    key, value = (tensor.repeat_interleave(HEADS // GROUPS, dim=2) for tensor in (key, value))
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) * SCALE
    document = torch.from_numpy((positions == 0).cumsum(axis=1))
    seen = (document[:, :, None] == document[:, None, :]).tril()
    weights = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1)
    return torch.einsum("bhst,tbhd->sbhd", weights, value).flatten(2)


def by_bounds(query, key, value, query_bounds, key_bounds, most_queries, most_keys, **options):
    """What the kernel of variable lengths is documented to do: last query and last key of a document are aligned."""
    assert options == {"scale": SCALE, "window_size": (-1, 0), "enable_gqa": True}
    assert query_bounds.dtype == key_bounds.dtype == torch.int32
    outputs = []
    bounds = (itertools.pairwise(bounds.tolist()) for bounds in (query_bounds, key_bounds))
    for (first, last), (first_key, last_key) in zip(*bounds, strict=True):
        assert 0 < last - first <= most_queries
        assert last - first <= last_key - first_key <= most_keys
        keys, values = (tensor[first_key:last_key].repeat_interleave(HEADS // GROUPS, dim=1) for tensor in (key, value))
        scores = torch.einsum("shd,thd->hst", query[first:last], keys) * SCALE
        places = torch.arange(last_key - first_key)
        seen = places[None, :] <= places[len(places) - (last - first) :, None]
        outputs.append(torch.einsum("hst,thd->shd", scores.masked_fill(~seen, -math.inf).softmax(-1), values))
    assert last == len(query) and last_key == len(key)
    return torch.cat(outputs)


@given(rows)
@settings(deadline=None, max_examples=30)
def test_context_ranks_attend_and_learn_as_under_the_whole_mask(example):
    context, starts = example
    positions = positions_of(starts)
    heads = random_heads(positions)
    expected = written_out(*heads, positions)
    gradients = torch.autograd.grad(expected.square().sum(), heads)
    query, key, value = heads
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "varlen_attn", by_bounds)
        for attend in (
            lambda *given: attend_one_by_one(*given, SCALE, TORCH_DECIDES),
            lambda *given: attend_by_lengths(*given, SCALE),
        ):
            outputs = [
                attend(held_by(query, rank, context), key, value, documents)
                for rank, documents in enumerate(of_ranks(positions, context))
            ]
            for rank, output in enumerate(outputs):
                torch.testing.assert_close(output, held_by(expected, rank, context))
            found = torch.autograd.grad(sum(output.square().sum() for output in outputs), heads)
            torch.testing.assert_close(found, gradients)


@given(rows)
def test_documents_say_where_everything_is(example):
    context, starts = example
    positions = positions_of(starts)
    for rank, documents in enumerate(of_ranks(positions, context)):
        mine = held_by(torch.from_numpy(positions.T), rank, context)
        assert documents.position_ids_SB.tolist() == mine.tolist()
        # Queries are this rank's tokens, each once; the keys of a document end where its queries end.
        assert documents.query_bounds[-1] == mine.numel()
        positions_of_last = [span.key_lengths[-1] - 1 for spans in documents.spans for span in spans]
        length = len(positions[0]) // (2 * context if context > 1 else 1)
        chunks = chunks_of_rank(rank, context) if context > 1 else (0,)
        assert positions_of_last == [row[(chunk + 1) * length - 1] for chunk in chunks for row in positions]


@pytest.mark.parametrize("positions", [[1, 2, 3], [0, 1, 1], [0, 2, 3], [0, 1, -1]])
def test_positions_that_jump_are_refused(positions):
    with pytest.raises(ValueError, match="begin at 0 again where another document begins"):
        Documents(np.array([positions]), (0,), 1)


def test_compiled_attention_is_one_graph_whatever_the_number_and_lengths_of_documents(monkeypatch):
    @torch.library.custom_op("tests::attend", mutates_args={})
    def attend(query: torch.Tensor, bounds: torch.Tensor, most: int) -> torch.Tensor:
        return query * most + len(bounds)

    attend.register_fake(lambda query, bounds, most: torch.empty_like(query))
    graphs = []

    def capture(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(attention, "varlen_attn", lambda q, k, v, b, _, most, *__, **___: attend(q, b, most))
    monkeypatch.setattr(attention, "attend_one_by_one", None)
    kernel = TORCH_DECIDES.__class__("lengths", has_lengths=True)
    compiled = torch.compile(lambda *given: attend_in_documents(*given, SCALE, kernel), backend=capture, fullgraph=True)
    random = np.random.default_rng(0)
    for number in range(4):
        starts = random.random((2, 64)) < 0.05 * (number + 1)
        documents = Documents(positions_in_documents(starts), (0,), 1)
        with torch.no_grad():
            query, key, value = (tensor.bfloat16() for tensor in random_heads(positions_in_documents(starts)))
        assert compiled(query, key, value, documents).shape == (64, 2, HEADS * DIM)
    assert len(graphs) <= 2, "one for the first micro-batch and one for all others"
