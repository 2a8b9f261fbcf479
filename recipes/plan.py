"""What a recipe takes on a cluster, before anything is asked of it: layout, memory, time, failures, energy, money.

`plan(config)` is arithmetic over the cost model in `parallel/plan`; `plan_table.py` and `plan_page.py` show it. Planned
is every stage that trains; evaluation and export take minutes at full size and are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from conf.errors import ConfigError, Problem
from conf.schema import Budget, HardwareConfig, RunConfig
from parallel.plan.hardware import Gpu, UnknownGpuError
from parallel.plan.layout import Layout
from parallel.plan.memory import StageMemory, memory
from parallel.plan.operations import (
    DAY,
    TOKEN_BYTES,
    Power,
    Saving,
    goodput,
    power,
    saving,
    site_gpu,
)
from parallel.plan.search import fastest, search
from parallel.plan.shapes import Shape, Teacher, shape_of
from parallel.plan.throughput import StepTime
from parallel.plan.traffic import AxisTraffic, traffic
from recipes import chain, fit, rules_service, rules_stages
from recipes.rules_layout import trainings_of
from recipes.stage_models import training_of_stage

WORTH_CHANGING = 0.01
"""A layout that gains less is within the noise of the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Better:
    """A faster layout than the configured one."""

    overrides: str
    layout: Layout
    gain: float
    """Of the throughput."""
    worst: StageMemory
    step: StepTime


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """One training stage."""

    name: str
    kind: str
    model: str
    shape: Shape
    teacher: Teacher | None
    """On the same GPUs."""
    serving: fit.Serving | None
    """A teacher on GPUs of its own."""
    layout: Layout
    worst: StageMemory
    step: StepTime
    tokens: int
    num_steps: int
    saves: Saving
    kept: int
    """Checkpoints kept."""
    goodput: float
    best_goodput: float
    """At the interval of Young and Daly."""
    power: Power
    pipeline: tuple[StageMemory, ...]
    """Memory of each pipeline rank."""
    traffic: tuple[AxisTraffic, ...]
    better: Better | None
    failures: float
    """Expected."""
    seconds: float
    """From the first step to the last checkpoint, interruptions included."""

    @property
    def num_gpus(self) -> int:
        """Those of its teacher included."""
        return self.layout.num_gpus + (self.serving.layout.num_gpus if self.serving else 0)

    @property
    def energy_mwh(self) -> float:
        """Megawatt hours of the building."""
        return self.power.mean_mw * self.seconds / 3600

    @property
    def data_bytes(self) -> float:
        """Tokens read, as stored."""
        return float(self.tokens) * TOKEN_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One limit of the budget."""

    name: str
    unit: str
    value: float
    limit: float

    @property
    def is_met(self) -> bool:
        """Whether it is kept."""
        return self.value <= self.limit


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A recipe on a cluster."""

    recipe: str
    description: str
    cluster: str
    hardware: HardwareConfig
    gpu: Gpu
    num_gpus: int
    """Of the largest stage."""
    budget: Budget
    stages: tuple[StagePlan, ...]

    @property
    def num_nodes(self) -> int:
        """Nodes, the last one perhaps not full."""
        return -(-self.num_gpus // self.hardware.gpus_per_node)

    @property
    def seconds(self) -> float:
        """Of all stages, one after another."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def days(self) -> float:
        """The same in days."""
        return self.seconds / DAY

    @property
    def energy_mwh(self) -> float:
        """Megawatt hours of the building."""
        return sum(stage.energy_mwh for stage in self.stages)

    @property
    def most_mw(self) -> float:
        """Power that must be provided."""
        return max(stage.power.most_mw for stage in self.stages)

    @property
    def dollars(self) -> float:
        """GPU hours at the cluster's price; storage and transfer are not in it."""
        gpu_seconds = sum(stage.num_gpus * stage.seconds for stage in self.stages)
        return gpu_seconds / 3600 * self.hardware.dollars_per_gpu_hour

    @property
    def storage_bytes(self) -> float:
        """Checkpoints kept by all stages, and one being written."""
        return sum(stage.saves.num_bytes * stage.kept for stage in self.stages) + max(
            stage.saves.num_bytes for stage in self.stages
        )

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """The limits of the recipe's budget."""
        return (
            Verdict(name="GPUs", unit="", value=self.num_gpus, limit=self.budget.gpus),
            Verdict(name="days", unit="d", value=self.days, limit=self.budget.days),
            Verdict(name="power", unit="MW", value=self.most_mw, limit=self.budget.power_mw),
        )

    @property
    def is_met(self) -> bool:
        """Whether every limit is kept."""
        return all(verdict.is_met for verdict in self.verdicts)


def plan(config: RunConfig) -> Plan:
    """The plan of a resolved configuration.

    Raises:
        ConfigError: the cluster or its GPU is not known, the axes do not divide it, or a stage does not fit its GPUs;
            with what would be possible.
    """
    hardware, gpu = _site_of(config)
    names = list(trainings_of(config))
    if not names:
        raise ConfigError([Problem("order", f"has no stage that trains ({', '.join(config.order)}): nothing to plan.")])
    for at in chain.sizes(config):
        here = [name for name in names if chain.is_here(at, name)]
        if here:
            _require_layout(at, gpu, here)
    stages = tuple(stage_plan(config, name, hardware, gpu, look_further=True) for name in names)
    return Plan(
        recipe=config.name,
        description=config.description,
        cluster=config.cluster.name,
        hardware=hardware,
        gpu=gpu,
        num_gpus=max(stage.num_gpus for stage in stages),
        budget=config.budget,
        stages=stages,
    )


def stage_plan(
    config: RunConfig, name: str, hardware: HardwareConfig, gpu: Gpu, *, look_further: bool = False
) -> StagePlan:
    """The plan of one stage, on the nodes it takes; a better layout is looked for only if asked."""
    config = chain.for_stage(config, name)
    training, layout = training_of_stage(config, name), fit.layout_of_stage(config, name)
    shape, teacher = fit.shape_of_stage(config, name), fit.teaching_of_stage(config, name)
    step = fit.step_of_stage(config, name, gpu)
    serving = fit.serving_of_stage(config, name)
    num_gpus = layout.num_gpus + (serving.layout.num_gpus if serving else 0)
    training_seconds = training.num_steps * step.seconds
    interval = (training.checkpoint_every_steps or training.num_steps) * step.seconds
    saves = saving(hardware, shape, layout.num_gpus, min(interval, training_seconds))
    useful = goodput(hardware, num_gpus, saves, saves.interval_seconds)
    best_useful = goodput(hardware, num_gpus, saves, min(saves.best_interval_seconds, training_seconds))
    seconds = training_seconds / useful if useful else float("inf")
    return StagePlan(
        name=name,
        kind=config.stages[name].kind,
        model=config.model.name if shape == shape_of(config.model) else f"smaller {config.model.name}",
        shape=shape,
        teacher=teacher,
        serving=serving,
        layout=layout,
        worst=fit.memory_of_stage(config, name),
        step=step,
        tokens=training.num_steps * training.tokens_per_step,
        num_steps=training.num_steps,
        saves=saves,
        kept=training.keep_checkpoints,
        goodput=useful,
        best_goodput=best_useful,
        power=power(hardware, gpu, num_gpus, step),
        pipeline=memory(shape, layout, teacher),
        traffic=traffic(shape, layout, gpu, teacher),
        better=_better(config, name, gpu, step) if look_further else None,
        failures=seconds / DAY * num_gpus / hardware.gpu_days_per_failure,
        seconds=seconds,
    )


def _better(config: RunConfig, name: str, gpu: Gpu, step: StepTime) -> Better | None:
    best = fastest(fit.task_of(config, name, gpu), partial(fit.refusal_in_place, config, name))
    if best is None:
        return None
    seconds = max(best.step.seconds, fit.served_seconds(config, name, gpu))
    if step.seconds < (1 + WORTH_CHANGING) * seconds:
        return None
    return Better(
        overrides=fit.overrides_to(config, name, best.layout),
        layout=best.layout,
        gain=step.seconds / seconds - 1,
        worst=best.worst,
        step=best.step,
    )


def _site_of(config: RunConfig) -> tuple[HardwareConfig, Gpu]:
    hardware = config.cluster.hardware
    if hardware is None:
        raise ConfigError(
            [
                Problem(
                    "cluster",
                    f"a plan needs what a cluster is made of and costs, and cluster {config.cluster.name} does not say "
                    "(cluster.hardware is null). Choose one that does, e.g. cluster=h200_ray, cluster=aws_p5en or "
                    "cluster=workstation, or add hardware@cluster.hardware=h200.",
                )
            ]
        )
    if config.scale != "full":
        raise ConfigError([Problem("scale", f"is {config.scale}; only the full size is worth a plan. Set scale=full.")])
    try:
        return hardware, site_gpu(hardware)
    except UnknownGpuError as error:
        raise ConfigError([Problem("cluster.hardware.gpu", str(error))]) from error


def _require_layout(config: RunConfig, gpu: Gpu, names: list[str]) -> None:
    rules = (*rules_stages.RULES, *fit.LAYOUT_RULES, *rules_service.RULES)
    problems = [problem for rule in rules for problem in rule(config, fit.NOBODY)]
    if problems:
        raise ConfigError([*problems, *_possible_layouts(config, gpu, names)])
    told = fit.told_memory(config, gpu)
    if told is not None:
        raise ConfigError([Problem("engine.mesh", told)])


def _possible_layouts(config: RunConfig, gpu: Gpu, names: list[str]) -> list[Problem]:
    """What the GPUs there are could do instead, where the configured axes do not divide them."""
    cluster = config.cluster
    if cluster.ranks_per_node is None:
        return []
    num_gpus = cluster.num_nodes * cluster.ranks_per_node
    mesh = config.engine.mesh
    whole = replace(
        config,
        engine=replace(
            config.engine, mesh=replace(mesh, tensor=1, context=1, pipeline=1, virtual_pipeline=1, data=num_gpus)
        ),
    )
    fullest = fit.fullest_of(whole)
    assert fullest is not None, "a plan has a stage that trains"
    name = fullest[0]

    def refuses(layout: Layout) -> str | None:
        at = fit.with_layout(whole, name, layout)
        too_large = any(fit.memory_of_stage(at, each).needed > gpu.memory_bytes for each in names)
        return "memory" if too_large else fit.refusal(whole, name, layout)

    front = search(fit.task_of(whole, name, gpu), refuses).front
    if not front:
        return [Problem("cluster.num_nodes", f"is {cluster.num_nodes}. {fit.nothing_fits(whole, name, gpu)}")]
    at = front[0].layout
    return [
        Problem(
            "engine.mesh",
            f"the fastest for '{name}' on {num_gpus} {gpu.name} is engine.mesh.tensor={at.tensor} "
            f"engine.mesh.context={at.context} engine.mesh.pipeline={at.pipeline} "
            f"engine.mesh.virtual_pipeline={at.virtual_pipeline} "
            f"stages.{name}.training.micro_batch={at.micro_batch}.",
        )
    ]
