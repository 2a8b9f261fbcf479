"""What would bring a plan within its budget, and what would make it better: overrides to type, with their effect."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from conf.schema import Budget, RunConfig
from parallel.plan.hardware import with_power_limit
from parallel.plan.layout import Layout
from parallel.plan.operations import DAY
from recipes import chain, fit
from recipes.plan import Plan, StagePlan, stage_plan
from recipes.rules_layout import trainings_of

MOST_TIMES_LARGER = 16
"""Larger clusters are not proposed."""
LOWEST_POWER_LIMIT = 0.5
"""Of the TDP: what drivers allow, about."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Remedy:
    """A change and what it does."""

    what: str
    """In words."""
    overrides: str
    days: float
    most_mw: float
    num_gpus: int

    def meets(self, budget: Budget) -> bool:
        """Whether every limit is kept then."""
        return self.days <= budget.days and self.most_mw <= budget.power_mw and self.num_gpus <= budget.gpus


def remedies(config: RunConfig, plan: Plan) -> list[Remedy]:
    """Best first: what meets the budget before what only comes closer."""
    found = [*_interval(plan)]
    gpus, days, power = plan.verdicts
    if not days.is_met:
        found += _tokens(config, plan)
    if not power.is_met:
        found += _power_limit(config, plan)
    # One layout for all stages, or one number of nodes, is no remedy where stages take different ones.
    if len(chain.sizes(config)) > 1:
        return sorted(found, key=lambda remedy: not remedy.meets(plan.budget))
    found = [*_layout(config, plan), *found]
    if not days.is_met:
        found += _more_gpus(config, plan)
    if not power.is_met or not gpus.is_met:
        most = min(plan.budget.gpus, int(plan.budget.power_mw / plan.most_mw * plan.num_gpus))
        found += _fewer_gpus(config, plan, most)
    return sorted(found, key=lambda remedy: not remedy.meets(plan.budget))


def _layout(config: RunConfig, plan: Plan) -> Iterator[Remedy]:
    """One layout for all stages: the best one of the longest."""
    longest = max(plan.stages, key=lambda stage: stage.seconds)
    if longest.better is None:
        return
    at = fit.with_layout(config, longest.name, longest.better.layout)
    stages = _stages(at, plan)
    if stages is not None and (days := _days(stages)) < plan.days:
        yield _remedy(plan, "a faster layout", longest.better.overrides, days)


def _interval(plan: Plan) -> Iterator[Remedy]:
    """Saving as often as Young and Daly say, where that wins a per cent."""
    steps, days = {}, 0.0
    for stage in plan.stages:
        worth = stage.best_goodput > stage.goodput + 0.01
        days += stage.seconds / DAY * (stage.goodput / stage.best_goodput if worth else 1)
        if worth:
            steps[stage.name] = max(1, round(stage.saves.best_interval_seconds / stage.step.seconds))
    if steps:
        overrides = " ".join(f"stages.{name}.training.checkpoint_every_steps={count}" for name, count in steps.items())
        yield _remedy(plan, "checkpoints as often as failures ask for", overrides, days)


def _tokens(config: RunConfig, plan: Plan) -> Iterator[Remedy]:
    share = plan.budget.days / plan.days
    # A control at equal FLOPs takes the tokens that follow from another stage's.
    own = [stage for stage in plan.stages if getattr(config.stages[stage.name], "flops_of", None) is None]
    tokens = {stage.name: _rounded_down(stage.tokens * share) for stage in own}
    if share <= 0 or any(count < trainings_of(config)[name].tokens_per_step for name, count in tokens.items()):
        return
    overrides = " ".join(f"stages.{name}.training.tokens={count:.3g}" for name, count in tokens.items())
    yield _remedy(plan, f"{100 * (1 - share):.0f} % fewer tokens", overrides, plan.budget.days)


def _rounded_down(value: float) -> float:
    digits = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(math.floor(value / digits) * digits)


def _more_gpus(config: RunConfig, plan: Plan) -> Iterator[Remedy]:
    """The fewest that are fast enough, with more data ranks of the same layout."""
    for layout in _sizes(plan, upwards=True):
        stages = _stages(fit.with_layout(_with_nodes(config, plan, layout), plan.stages[0].name, layout), plan)
        if stages is not None and _days(stages) <= plan.budget.days:
            yield _of_size(plan, layout, stages)
            return


def _fewer_gpus(config: RunConfig, plan: Plan, most: int) -> Iterator[Remedy]:
    for layout in _sizes(plan, upwards=False):
        if layout.num_gpus <= most:
            stages = _stages(fit.with_layout(_with_nodes(config, plan, layout), plan.stages[0].name, layout), plan)
            if stages is not None:
                yield _of_size(plan, layout, stages)
                return


def _of_size(plan: Plan, layout: Layout, stages: list[StagePlan]) -> Remedy:
    beyond = ", more than the budget has" if layout.num_gpus > plan.budget.gpus else ""
    return Remedy(
        what=f"{layout.num_gpus:,} GPUs{beyond}",
        overrides=f"cluster.num_nodes={_nodes(plan, layout)}",
        days=_days(stages),
        most_mw=_megawatts(stages),
        num_gpus=layout.num_gpus,
    )


def _power_limit(config: RunConfig, plan: Plan) -> Iterator[Remedy]:
    """GPUs held below their TDP."""
    others = plan.num_nodes * plan.hardware.node_watts
    watts = math.floor((plan.budget.power_mw * 1e6 / plan.hardware.pue - others) / plan.num_gpus / 10) * 10
    if watts < LOWEST_POWER_LIMIT * plan.gpu.tdp_watts:
        return
    limited = with_power_limit(plan.gpu, watts)
    stages = [stage_plan(config, stage.name, plan.hardware, limited) for stage in plan.stages]
    yield Remedy(
        what=f"GPUs limited to {watts} W each (nvidia-smi -pl {watts})",
        overrides="",
        days=_days(stages),
        most_mw=_megawatts(stages),
        num_gpus=plan.num_gpus,
    )


def _sizes(plan: Plan, *, upwards: bool) -> Iterator[Layout]:
    """The first stage's layout with other numbers of data ranks, nearest first, in whole nodes."""
    layout = plan.stages[0].layout
    sizes = range(layout.data + 1, MOST_TIMES_LARGER * layout.data + 1) if upwards else range(layout.data - 1, 0, -1)
    for data in sizes:
        other = replace(layout, data=data)
        if other.num_gpus % plan.hardware.gpus_per_node == 0:
            yield other


def _nodes(plan: Plan, layout: Layout) -> int:
    return layout.num_gpus // plan.hardware.gpus_per_node


def _with_nodes(config: RunConfig, plan: Plan, layout: Layout) -> RunConfig:
    return replace(config, cluster=replace(config.cluster, num_nodes=_nodes(plan, layout)))


def _stages(config: RunConfig, plan: Plan) -> list[StagePlan] | None:
    """All stages of a changed configuration, or None where one is refused or does not fit."""
    for stage in plan.stages:
        if fit.refusal(config, stage.name, fit.layout_of_stage(config, stage.name)):
            return None
        if fit.memory_of_stage(config, stage.name).needed > plan.gpu.memory_bytes:
            return None
    return [stage_plan(config, stage.name, plan.hardware, plan.gpu) for stage in plan.stages]


def _megawatts(stages: list[StagePlan]) -> float:
    return max(stage.power.most_mw for stage in stages)


def _days(stages: list[StagePlan]) -> float:
    return sum(stage.seconds for stage in stages) / DAY


def _remedy(plan: Plan, what: str, overrides: str, days: float) -> Remedy:
    """On the same GPUs."""
    return Remedy(what=what, overrides=overrides, days=days, most_mw=plan.most_mw, num_gpus=plan.num_gpus)
