"""What to tell somebody whose stage ran out of memory: what the planner's memory model says, and what would fit."""

from __future__ import annotations

from dataclasses import replace

from conf.schema import RunConfig
from parallel.plan.hardware import GPUS, Gpu, UnknownGpuError, gpu_named
from parallel.plan.memory import GIB
from recipes import fit

WORTH_TRYING = 0.9
"""Of what the model says is needed now: where it said that this would fit, a change must at least save something."""


def advice(config: RunConfig, stage: str, capacity_bytes: int) -> str:
    """Lines for somebody whose stage ran out of memory on devices of `capacity_bytes`."""
    now = fit.memory_of_stage(config, stage).needed
    found = changes_for(config, stage, capacity_bytes)
    has = f"{capacity_bytes / GIB:.1f} GiB"
    lines = [f"The memory model puts this stage at {now / GIB:.1f} GiB a rank, and a device has {has}."]
    if now <= capacity_bytes:
        lines.append("By that it should fit: look for other processes on the device first.")
    if not found and now <= capacity_bytes:
        lines.append("No change to batch, recomputation or axes on these ranks would save a tenth of it.")
    elif not found:
        lines.append("No change to batch, recomputation or axes on these ranks would fit; it takes more ranks.")
    else:
        lines.append("Would fit:")
        lines += [f"  {change.overrides}   ({change.worst.needed / GIB:.1f} GiB a rank)" for change in found]
    return "\n".join(lines)


def changes_for(config: RunConfig, stage: str, capacity_bytes: float) -> list[fit.Change]:
    """Up to three changes with which all stages fit and this one needs less than it did."""
    below = WORTH_TRYING * fit.memory_of_stage(config, stage).needed
    return fit.changes_that_fit(config, stage, _device(config, capacity_bytes), below=below)


def _device(config: RunConfig, capacity_bytes: float) -> Gpu:
    """The GPU of the budget with the memory there is; another stands for one that is not known."""
    try:
        gpu = gpu_named(config.budget.gpu)
    except UnknownGpuError:
        gpu = GPUS["H100"]
    return replace(gpu, memory_bytes=capacity_bytes)
