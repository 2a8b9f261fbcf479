"""What of a micro-batch a rank takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.batch import Batch
from parallel.mesh import Coordinate, Mesh
from parallel.plan.divides import pieces_of_sequence
from parallel.schedule import Schedule

MESH = Mesh(tensor=2, context=2)


def rows_of(num_tokens: int) -> Batch:
    tokens_BS = np.arange(num_tokens)[None]
    return Batch(
        tokens_BS=tokens_BS,
        labels_BS=tokens_BS,
        loss_mask_BS=np.ones((1, num_tokens), dtype=np.float32),
        position_ids_BS=tokens_BS,
        sample_ids_B=np.zeros(1, dtype=np.int64),
    )


@pytest.mark.parametrize("splits_sequence", [False, True])
def test_rows_of_every_length_that_passes_the_checks_before_launch_are_taken(splits_sequence):
    schedule = Schedule(
        mesh=MESH,
        coordinate=Coordinate(pipeline=0, data=0, context=1, tensor=0),
        device=torch.device("cpu"),
        micro_batch=1,
        virtual_pipeline=1,
        splits_sequence=splits_sequence,
    )
    pieces = pieces_of_sequence(context=2, tensor=2, sequence_parallel=splits_sequence)
    (inputs,) = schedule.inputs([rows_of(3 * pieces)])
    assert inputs.tokens_BS.shape == (1, 3 * pieces // 2)
    with pytest.raises(ValueError, match=f"multiple of {pieces}"):
        schedule.inputs([rows_of(3 * pieces - 1)])
