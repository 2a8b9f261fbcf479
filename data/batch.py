"""What one data-parallel rank puts through the model at once.

B rows, S tokens. Plain numpy: data code runs where torch is not installed.
"""

from __future__ import annotations

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
        position_ids_BS: int64 position of each token for the rotary embedding.
        sample_ids_B: int64 global sample number of each row (training) or document number (held-out text).
    """

    tokens_BS: npt.NDArray[np.int64]
    labels_BS: npt.NDArray[np.int64]
    loss_mask_BS: npt.NDArray[np.float32]
    position_ids_BS: npt.NDArray[np.int64]
    sample_ids_B: npt.NDArray[np.int64]
