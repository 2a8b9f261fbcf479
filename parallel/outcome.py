"""How a step ends: decided on the device, so that the device never waits for the host.

The host reads the outcome while the device is busy with the optimizer's update, and is back with work for the next step
before that is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.engine import StepResult

EPSILON = 1e-6  # keeps a gradient of zero from being divided by


@dataclass(frozen=True, slots=True)
class Outcome:
    """What follows from a step's sums over the world.

    Attributes:
        divisor: to divide the summed gradients by before the update: counted tokens, and clipping; float32, shape ().
        skip: 1.0 where the update must not be made (something is not finite), else 0.0; float32, shape ().
        report: loss, gradient norm, counted tokens, requests to stop, `skip` and the means of the metrics; float64.
    """

    divisor: Tensor
    skip: Tensor
    report: Tensor

    @classmethod
    def of(cls, sums: Tensor, *, clip_grad_norm: float) -> Outcome:
        """Decide.

        Args:
            sums: the squared gradient norm of the summed gradients, requests to stop, loss, counted tokens, metrics;
                float64, the same on every rank.
            clip_grad_norm: largest gradient norm, 0 for any.
        """
        squared_norm, stop, loss, num_tokens = sums[:4].unbind()
        grad_norm = squared_norm.sqrt() / num_tokens
        clip = torch.ones_like(grad_norm)
        if clip_grad_norm > 0:
            clip = (clip_grad_norm / (grad_norm + EPSILON)).clamp(max=1.0)
        mean_loss = loss / num_tokens  # not finite where no token was counted
        skip = 1.0 - (mean_loss.isfinite() & grad_norm.isfinite()).double()
        report = torch.cat((torch.stack((mean_loss, grad_norm, num_tokens, stop, skip)), sums[4:] / num_tokens))
        return cls(divisor=(num_tokens / clip).float(), skip=skip.float(), report=report)


def begin_reading(values: Tensor) -> Callable[[], list[float]]:
    """Start a copy to the host behind the work queued so far; the call that is returned waits for it."""
    if not values.is_cuda:
        return values.tolist
    on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    on_host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return on_host.tolist()

    return read


def result_of(report: Sequence[float], metric_names: Sequence[str]) -> StepResult:
    """The report as the loop wants it.

    Raises:
        ValueError: no token was counted.
        FloatingPointError: the update was skipped.
    """
    loss, grad_norm, num_tokens, stop, skip, *metrics = report
    if num_tokens == 0:
        raise ValueError("the global batch has no counted token; the step was not taken")
    if skip:
        raise FloatingPointError(
            f"loss {loss}, gradient norm {grad_norm} over {round(num_tokens)} tokens: not finite; "
            "the step was not taken"
        )
    return StepResult(
        loss=loss,
        grad_norm=grad_norm,
        num_tokens=round(num_tokens),
        metrics=dict(zip(metric_names, metrics, strict=True)),
        stop=stop > 0,
    )
