"""AdamW on torch's fused kernel, with its state made at once.

Megatron falls back to torch's AdamW with one kernel an operation and a parameter, and makes the state in the first
step; here memory is taken when the engine is built, and a checkpoint can be written and read at any step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from conf.schema import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


Adam = TypeVar("Adam", bound=torch.optim.AdamW)


def make_adam(
    parameters: Iterable[torch.nn.Parameter],
    optim: OptimConfig,
    kind: Callable[..., Adam] = torch.optim.AdamW,  # type: ignore[assignment]
) -> Adam:
    """AdamW over two groups: matrices with weight decay, norms (one dim) without."""
    parameters = list(parameters)
    groups = [
        {"params": [parameter for parameter in parameters if parameter.dim() > 1], "weight_decay": optim.weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() == 1], "weight_decay": 0.0},
    ]
    return kind(groups, lr=optim.learning_rate, betas=(optim.beta1, optim.beta2), eps=optim.epsilon, fused=True)


def make_state(adam: torch.optim.AdamW) -> None:
    """Make the state of every parameter, as after no steps."""
    for parameter in parameters_of(adam):
        make_state_of(adam, parameter)


def make_state_of(adam: torch.optim.AdamW, parameter: Tensor) -> None:
    """Make the state of one parameter."""
    adam.state[parameter] = {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        **{moment: torch.zeros_like(parameter) for moment in MOMENTS},
    }


def moments_of(adam: torch.optim.AdamW, parameter: Tensor) -> dict[str, Tensor]:
    """First and second moment of a parameter, by name."""
    return {moment: adam.state[parameter][moment] for moment in MOMENTS}


def set_num_steps(adam: torch.optim.AdamW, num_steps: int) -> None:
    """Continue as after `num_steps` steps: bias correction depends on it."""
    for parameter in parameters_of(adam):
        adam.state[parameter]["step"].fill_(num_steps)


def set_learning_rate(adam: torch.optim.AdamW, learning_rate: float) -> None:
    """Set the learning rate of the next step."""
    for group in adam.param_groups:
        group["lr"] = learning_rate


def prepare_step(adam: torch.optim.AdamW, *, divisor: Tensor, skip: Tensor, learning_rate: float) -> None:
    """Say what the next step does.

    Args:
        adam: the optimizer.
        divisor: what the gradients are divided by, float32, shape ().
        skip: 1.0 to change nothing (no moment, no count of steps), else 0.0; float32, shape ().
        learning_rate: of the step.
    """
    set_learning_rate(adam, learning_rate)
    # What torch's gradient scaler sets: the fused kernel reads both from the device.
    adam.grad_scale = divisor  # type: ignore[attr-defined]
    adam.found_inf = skip  # type: ignore[attr-defined]


def parameters_of(adam: torch.optim.AdamW) -> Iterator[Tensor]:
    """Every parameter."""
    for group in adam.param_groups:
        yield from group["params"]
