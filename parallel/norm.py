"""RMSNorm that Megatron's layer specs can build and that works with sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch

from parallel.device import this_device


class RMSNorm(torch.nn.RMSNorm):
    """Normalisation by the root mean square over the last dim, computed in float32.

    Megatron's own wrapper around torch refuses sequence parallelism.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, device=this_device(), dtype=config.params_dtype)
        # Each tensor rank sees only its part of the sequence: Megatron sums the gradients of parameters marked so.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
