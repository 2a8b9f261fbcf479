"""From a batch of the data stream to tensors on this rank's device.

Shape suffixes: B rows, S tokens of this context rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
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

    def place(array: npt.NDArray[np.generic]) -> Tensor:
        if mesh.context > 1:
            chunks = np.split(array, num_chunks, axis=1)
            array = np.concatenate([chunks[chunk] for chunk in held], axis=1)
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    return Inputs(
        tokens_BS=place(batch.tokens_BS),
        labels_BS=place(batch.labels_BS),
        loss_mask_BS=place(batch.loss_mask_BS),
        position_ids_BS=place(batch.position_ids_BS),
        documents=None if is_whole else Documents(batch.position_ids_BS, held, num_chunks).to(device),
    )
