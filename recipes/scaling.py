"""How a stage would run on other numbers of GPUs: the curve of a plan."""

from __future__ import annotations

from dataclasses import dataclass, replace

from conf.schema import RunConfig
from parallel.plan.layout import Layout
from parallel.plan.operations import DAY
from parallel.plan.search import fastest
from parallel.plan.throughput import step_time
from recipes import chain, fit
from recipes.plan import Plan, StagePlan

SIZES = tuple(256 << power for power in range(7))
"""256 to 16,384 GPUs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A stage on another number of GPUs. Rates are tokens/s a GPU, None where no layout is possible."""

    num_gpus: int
    same_batch: float | None
    """The fastest layout found, the batch as configured: what a run gets from more GPUs."""
    grown_batch: float | None
    """The configured layout, the batch in proportion to the GPUs."""
    days: float | None
    """For the stage's tokens, the batch as configured."""


def scaling(config: RunConfig, plan: Plan, stage: StagePlan) -> tuple[Point, ...]:
    """Points from 256 to 16,384 GPUs and at the stage's own number."""
    config = chain.for_stage(config, stage.name)
    return tuple(_point(config, plan, stage, size) for size in sorted({*SIZES, stage.layout.num_gpus}))


def _point(config: RunConfig, plan: Plan, stage: StagePlan, num_gpus: int) -> Point:
    task = replace(
        fit.task_of(config, stage.name, plan.gpu), num_gpus=num_gpus, recompute=("none",), micro_batches=(1, 2)
    )
    best = fastest(task)
    same = best.step.tokens_per_s_per_gpu if best else None
    others = stage.layout.num_gpus // stage.layout.data
    grown = None
    if num_gpus % others == 0:
        layout = _grown(stage.layout, num_gpus // others)
        grown = step_time(stage.shape, layout, plan.gpu, teacher=stage.teacher).tokens_per_s_per_gpu
    seconds = stage.tokens / (same * num_gpus) / stage.goodput if same else None
    return Point(
        num_gpus=num_gpus, same_batch=same, grown_batch=grown, days=seconds / DAY if seconds is not None else None
    )


def _grown(layout: Layout, data: int) -> Layout:
    return replace(layout, data=data, global_batch=layout.global_batch // layout.data * data)
