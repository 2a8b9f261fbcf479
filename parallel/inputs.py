"""From a batch of the data stream to tensors on this rank's device.

Shape suffixes: B rows, S tokens of this context rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from data.batch import Batch
from parallel.attention import chunks_of_rank
from parallel.documents import Documents
from parallel.mesh import Coordinate, Mesh


@dataclass(frozen=True, slots=True)
class Inputs:
    """One micro-batch on the device; see `Batch`. `documents` is None where every row is one document."""

    tokens_BS: Tensor
    labels_BS: Tensor
    loss_mask_BS: Tensor
    position_ids_BS: Tensor
    documents: Documents | None = None

    def through(self, model: Any) -> Tensor:
        """What a GPTModel, or what it is wrapped in, makes of the micro-batch."""
        return cast(Tensor, model(self.tokens_BS, self.position_ids_BS, None, packed_seq_params=self.documents))


def inputs_of_rank(batch: Batch, mesh: Mesh, coordinate: Coordinate, device: torch.device) -> Inputs:
    """This context rank's part of a micro-batch, on the device.

    Raises:
        ValueError: a position is neither 0 nor one more than the one before it.
    """
    num_chunks = 2 * mesh.context if mesh.context > 1 else 1
    held = chunks_of_rank(coordinate.context, mesh.context) if mesh.context > 1 else (0,)
    is_whole = (batch.position_ids_BS == np.arange(batch.tokens_BS.shape[1])).all()

    return Inputs(
        tokens_BS=placed(batch.tokens_BS, mesh, coordinate, device),
        labels_BS=placed(batch.labels_BS, mesh, coordinate, device),
        loss_mask_BS=placed(batch.loss_mask_BS, mesh, coordinate, device),
        position_ids_BS=placed(batch.position_ids_BS, mesh, coordinate, device),
        documents=None if is_whole else Documents(batch.position_ids_BS, held, num_chunks).to(device),
    )


def placed(array: npt.NDArray[np.generic], mesh: Mesh, coordinate: Coordinate, device: torch.device) -> Tensor:
    """This context rank's tokens (the second dim) of whole rows, on the device."""
    if mesh.context > 1:
        chunks = np.split(array, 2 * mesh.context, axis=1)
        array = np.concatenate([chunks[held] for held in chunks_of_rank(coordinate.context, mesh.context)], axis=1)
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def rows_of_ranks(part_BS: Tensor, context: int) -> Tensor:
    """Whole rows from the tokens (the second dim) that each of the context ranks holds; the inverse of `placed`."""
    if context == 1:
        return part_BS
    group = parallel_state.get_context_parallel_group()
    parts = [torch.empty_like(part_BS) for _ in range(context)]
    dist.all_gather(parts, part_BS.contiguous(), group=group)
    chunks: list[Tensor] = [part_BS] * (2 * context)
    for rank, part in enumerate(parts):
        for number, chunk in zip(chunks_of_rank(rank, context), part.chunk(2, dim=1), strict=True):
            chunks[number] = chunk
    return torch.cat(chunks, dim=1)
