from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.batch import Batch
from parallel.inputs import inputs_of_rank
from parallel.mesh import Mesh

CPU = torch.device("cpu")


def batch(num_tokens: int = 12) -> Batch:
    tokens = np.arange(2 * num_tokens).reshape(2, num_tokens)
    return Batch(
        tokens_BS=tokens,
        labels_BS=tokens + 1,
        loss_mask_BS=(tokens % 3 == 0).astype(np.float32),
        position_ids_BS=np.tile(np.arange(num_tokens), (2, 1)),
        sample_ids_B=np.arange(2),
    )


@pytest.mark.parametrize("context", [1, 2, 3])
def test_context_ranks_together_hold_every_token_once_with_its_label_mask_and_position(context):
    mesh, whole = Mesh(context=context), batch()
    parts = [inputs_of_rank(whole, mesh, mesh.coordinate(rank), CPU) for rank in range(context)]
    order = torch.cat([part.position_ids_BS[0] for part in parts]).argsort()
    for name in ("tokens_BS", "labels_BS", "loss_mask_BS", "position_ids_BS"):
        together = torch.cat([getattr(part, name) for part in parts], dim=1)[:, order]
        assert together.tolist() == getattr(whole, name).tolist()
    assert len({part.tokens_BS.shape for part in parts}) == 1


def test_each_context_rank_has_an_early_and_a_late_chunk():
    mesh = Mesh(context=2)
    held = [inputs_of_rank(batch(8), mesh, mesh.coordinate(rank), CPU).position_ids_BS[0].tolist() for rank in (0, 1)]
    assert held == [[0, 1, 6, 7], [2, 3, 4, 5]]


@pytest.mark.parametrize("context", [1, 3])
def test_rows_with_one_document_each_have_nothing_to_keep_apart(context):
    mesh = Mesh(context=context)
    assert inputs_of_rank(batch(), mesh, mesh.coordinate(0), CPU).documents is None
    second = batch().position_ids_BS % np.array([[12], [5]])
    documents = inputs_of_rank(replace(batch(), position_ids_BS=second), mesh, mesh.coordinate(0), CPU).documents
    assert documents is not None and len(documents.query_bounds) - 1 == 4


def test_positions_that_begin_within_a_document_are_refused():
    shifted = replace(batch(), position_ids_BS=np.tile(np.arange(12) + 1, (2, 1)))
    with pytest.raises(ValueError, match="positions of a row"):
        inputs_of_rank(shifted, Mesh(), Mesh().coordinate(0), CPU)
