"""What one data-parallel rank puts through the model at once.

B rows, S tokens. Plain numpy: data code runs where torch is not installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch.

    Attributes:
        tokens_BS: int64 token ids the model reads.
        labels_BS: int64 token ids it should predict; `labels[b, s]` follows `tokens[b, s]`.
        loss_mask_BS: float32, 1.0 where a label counts.
        position_ids_BS: int64 position of each token for the rotary embedding, 0 where a row or, in rows that keep
            documents apart, a document begins: attention does not go further back than that.
        sample_ids_B: int64 global sample number of each row (training) or document number (held-out text).
    """

    tokens_BS: npt.NDArray[np.int64]
    labels_BS: npt.NDArray[np.int64]
    loss_mask_BS: npt.NDArray[np.float32]
    position_ids_BS: npt.NDArray[np.int64]
    sample_ids_B: npt.NDArray[np.int64]

    @property
    def cumulative_lengths(self) -> npt.NDArray[np.int32]:
        """Where documents begin, and the end, counting tokens over rows one after another; shape (documents + 1,)."""
        starts = np.flatnonzero(self.position_ids_BS == 0)
        return np.append(starts, self.position_ids_BS.size).astype(np.int32)


def positions_in_documents(starts_BS: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Positions that begin at 0 with each row and wherever `starts_BS` says; shape (B, S).

    >>> positions_in_documents(np.array([[False, False, True, False, True]])).tolist()
    [[0, 1, 0, 1, 0]]
    """
    places = np.arange(starts_BS.shape[1], dtype=np.int64)
    return places - np.maximum.accumulate(np.where(starts_BS, places, 0), axis=1)


def attended_length(batches: Sequence[Batch]) -> float:
    """Length of the document (its part in the row) that a token is in, averaged over tokens.

    It stands for the length of the row in FLOPs of attention: in rows that are one document each it is that length.
    """
    lengths = np.concatenate([np.diff(batch.cumulative_lengths) for batch in batches]).astype(np.float64)
    return float((lengths**2).sum() / lengths.sum())
