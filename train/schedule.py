"""The learning rate of every step. Arithmetic only."""

from __future__ import annotations

import math

from conf.schema import OptimConfig


def learning_rate(optim: OptimConfig, step: int, num_steps: int) -> float:
    """Learning rate of a step.

    Warm-up rises linearly and reaches the peak on its last step, so the first step already learns. The decay ends on
    the last step with exactly `final_learning_rate_ratio` of the peak.

    Args:
        optim: peak and shape of the schedule.
        step: step that is about to be taken, 0-based.
        num_steps: steps of the stage.

    Raises:
        ValueError: step is not in [0, num_steps).
    """
    if not 0 <= step < num_steps:
        raise ValueError(f"step {step} is outside a stage of {num_steps} steps")
    last = num_steps - 1
    warmup_steps = round(optim.warmup_fraction * num_steps)
    peak_step = max(warmup_steps - 1, 0)
    if step < peak_step:
        return optim.learning_rate * (step + 1) / warmup_steps
    match optim.schedule:
        case "cosine":
            remaining = (1 + math.cos(math.pi * _progress(step, peak_step, last))) / 2
        case "wsd":
            decay_start = max(last - round(optim.decay_fraction * num_steps), peak_step)
            remaining = 1 - _progress(step, decay_start, last)
    final = optim.final_learning_rate_ratio
    return optim.learning_rate * (final + (1 - final) * remaining)


def _progress(step: int, start: int, last: int) -> float:
    return max(0.0, (step - start) / (last - start)) if last > start else 0.0
