"""RMSNorm that Megatron's layer specs can build and that works with sequence parallelism."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from parallel.device import this_device


class RMSNorm(torch.nn.RMSNorm):
    """Normalisation by the root mean square over the last dim, computed in float32.

    Megatron's own wrapper around torch refuses sequence parallelism.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, device=this_device(), dtype=config.params_dtype)
        # Each tensor rank sees only its part of the sequence: Megatron sums the gradients of parameters marked so.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """The normalised hidden states, times a weight a channel."""
        if hidden.is_cpu and hidden.dtype == torch.float32:
            return cast(Tensor, _NormInFewPasses.apply(hidden, self.weight, self.eps))  # type: ignore[no-untyped-call]
        return super().forward(hidden)


class _NormInFewPasses(torch.autograd.Function):
    """For a CPU, which has no kernel for it: torch goes back through each of its operations, half as fast."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        scale = torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + epsilon)
        normal = hidden * scale
        ctx.save_for_backward(normal, scale, weight)
        return normal * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        normal, scale, weight = ctx.saved_tensors
        weight_gradient = (gradient * normal).flatten(0, -2).sum(dim=0)
        gradient = gradient * weight
        along = (gradient * normal).mean(dim=-1, keepdim=True)
        return gradient.addcmul_(normal, along, value=-1.0).mul_(scale), weight_gradient, None
