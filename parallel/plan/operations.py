"""What a step time becomes over weeks: failures, checkpoints, goodput, power and money. Arithmetic only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from conf.schema import HardwareConfig
from parallel.plan.hardware import Gpu, gpu_named
from parallel.plan.shapes import Shape
from parallel.plan.throughput import StepTime

DAY = 86400.0
SAVED_BYTES = 14.0
"""Bytes a parameter in a checkpoint: bf16 weights, fp32 masters and two moments."""
WAITING_DRAW = 0.35
"""Of its TDP, what a GPU draws while it waits for links: clocks stay up. Between idle (0.1) and busy."""
COPY_BANDWIDTH = 2e9
"""Bytes/s that a rank copies for a save while training waits: `bench/checkpoint.py`, CPU ranks; a GPU's is faster."""
TOKEN_BYTES = 4
"""Of a stored token, with vocabularies above 65,536."""


def site_gpu(hardware: HardwareConfig) -> Gpu:
    """The GPU as this site connects it.

    Raises:
        UnknownGpuError: its facts are not in the table; the message says which to give.
    """
    gpu = gpu_named(hardware.gpu)
    return Gpu(
        **{
            **{name: getattr(gpu, name) for name in Gpu.__dataclass_fields__},
            "nvlink_bandwidth": hardware.node_link_gb_per_s * 1e9,
            "network_bandwidth": hardware.network_gb_per_s * 1e9,
            "gpus_per_node": hardware.gpus_per_node,
        }
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Power:
    """Megawatts of the building, cooling included."""

    mean_mw: float
    """While training: what energy is counted from."""
    most_mw: float
    """Every GPU at its limit: what must be provided, and what a power budget is held against."""


def power(hardware: HardwareConfig, gpu: Gpu, num_gpus: int, step: StepTime) -> Power:
    """Power of a training step."""
    busy = (step.matmul + step.attention + step.elementwise + step.teacher) / step.seconds
    nodes = math.ceil(num_gpus / hardware.gpus_per_node)
    others = nodes * hardware.node_watts

    def megawatts(watts_per_gpu: float) -> float:
        return (num_gpus * watts_per_gpu + others) * hardware.pue / 1e6

    mean = gpu.tdp_watts * (WAITING_DRAW + (1 - WAITING_DRAW) * busy)
    return Power(mean_mw=megawatts(mean), most_mw=megawatts(gpu.tdp_watts))


@dataclass(frozen=True, kw_only=True, slots=True)
class Saving:
    """Checkpoints of a stage."""

    num_bytes: float
    blocked_seconds: float
    """That a save keeps training waiting: the copy to host memory."""
    durable_seconds: float
    """Until it is on the disk; the next one can begin."""
    interval_seconds: float
    """As configured."""
    best_interval_seconds: float
    """Young and Daly: the square root of twice the blocked time and the time between failures, and not before the one
    before is durable."""


def saving(hardware: HardwareConfig, shape: Shape, num_gpus: int, interval_seconds: float) -> Saving:
    """What saving takes; `interval_seconds` is the time between saves, or of the whole stage where it saves once."""
    num_bytes = shape.num_parameters * SAVED_BYTES
    nodes = math.ceil(num_gpus / hardware.gpus_per_node)
    blocked = num_bytes / num_gpus / COPY_BANDWIDTH
    durable = blocked + num_bytes / (nodes * hardware.storage_gb_per_s * 1e9)
    between_failures = hardware.gpu_days_per_failure * DAY / num_gpus
    return Saving(
        num_bytes=num_bytes,
        blocked_seconds=blocked,
        durable_seconds=durable,
        interval_seconds=interval_seconds,
        best_interval_seconds=max(durable, math.sqrt(2 * blocked * between_failures)),
    )


def goodput(hardware: HardwareConfig, num_gpus: int, saves: Saving, interval_seconds: float) -> float:
    """Share of the time that is training: what failures throw away, restarts and saves take the rest.

    A failure loses half an interval and what was not yet durable, and the restart. To first order in interval over time
    between failures, as Young's formula is; 0 where failures come faster than a run gets over them.
    """
    between_failures = hardware.gpu_days_per_failure * DAY / num_gpus
    lost = interval_seconds / 2 + saves.durable_seconds + hardware.restart_minutes * 60
    return max(0.0, (1 - saves.blocked_seconds / interval_seconds) / (1 + lost / between_failures))
