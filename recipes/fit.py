"""Whether a configuration fits its GPUs by the planner's memory model, and what would.

The checks before launch and the plan both ask here, so that they cannot disagree: a layout is possible where the rules
of `rules_layout.py` allow it and the fullest pipeline stage needs no more than the GPU has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from conf.schema import RunConfig
from parallel.plan.configured import layout_of
from parallel.plan.hardware import Gpu
from parallel.plan.layout import Layout, Recompute, Sharding
from parallel.plan.memory import GIB, StageMemory, serving_memory
from parallel.plan.search import Task, search, smallest_cluster, worst_stage
from parallel.plan.shapes import Shape, Teacher, shape_of
from parallel.plan.throughput import StepTime, step_time, teacher_seconds
from recipes import rules_engine, rules_experts, rules_layout
from recipes.chain import is_here
from recipes.machine import Machine
from recipes.rules_layout import trainings_of
from recipes.serving import engine_of_service, mesh_of_service, services_of
from recipes.stage_models import distillation_of, model_of_stage, models_of, teacher_of_stage
from train.quantities import byte_size

HOST_BYTES = 200 * GIB
"""Host memory that a GPU can count on where it is only advised: eight GPUs in a node of 2 TiB."""
DISK_BYTES = 3.84e12
"""Of a local disk, likewise: a drive a GPU."""
A_DIRECTORY = "DIR"
"""To be filled in."""
NOBODY = Machine(cores=1, memory_bytes=0)
"""Rules of layouts do not look at the machine."""
LAYOUT_RULES = (*rules_layout.RULES, *rules_engine.RULES, *rules_experts.RULES)
"""Those that say which layouts there are."""


def shape_of_stage(config: RunConfig, name: str) -> Shape:
    """The model a stage trains: the pruned one while it recovers, the student while it is distilled."""
    return shape_of(model_of_stage(config, name))


def teaching_of_stage(config: RunConfig, name: str) -> Teacher | None:
    """The model a stage learns from, on the same ranks, where it learns from one."""
    distillation, teacher = distillation_of(config.stages[name]), teacher_of_stage(config, name)
    if distillation is None or teacher is None or distillation.logits is not None or distillation.service is not None:
        return None  # what was written down, or is said elsewhere, comes with the batches
    matched = distillation.hidden_states.layers if distillation.hidden_states is not None else {}
    return Teacher(shape=shape_of(teacher), top_k=distillation.top_k, hidden_layers=len(matched))


def memory_of_stage(config: RunConfig, name: str) -> StageMemory:
    """Memory of the fullest pipeline rank of a training stage."""
    return worst_stage(shape_of_stage(config, name), layout_of_stage(config, name), teaching_of_stage(config, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """A teacher on GPUs of its own."""

    teacher: Teacher
    layout: Layout
    worst: StageMemory


def serving_of_stage(config: RunConfig, name: str) -> Serving | None:
    """The teacher that a stage has on other ranks, where it has one."""
    service, taught_by = services_of(config).get(name), teacher_of_stage(config, name)
    distillation = distillation_of(config.stages[name])
    if service is None or taught_by is None or distillation is None:
        return None
    engine = engine_of_service(config, service)
    layout = layout_of(engine, trainings_of(config)[name], data=mesh_of_service(service).data)
    teacher = Teacher(shape=shape_of(taught_by), top_k=distillation.top_k)
    return Serving(teacher=teacher, layout=layout, worst=serving_memory(teacher, layout))


def served_seconds(config: RunConfig, name: str, gpu: Gpu) -> float:
    """What a stage's teacher takes for a step on GPUs of its own, beside the student; 0 where it has none."""
    serving = serving_of_stage(config, name)
    return 0.0 if serving is None else teacher_seconds(serving.teacher, serving.layout, gpu)


def step_of_stage(config: RunConfig, name: str, gpu: Gpu) -> StepTime:
    """Time of a step of a training stage, its teacher's part included: beside the student, the slower one decides."""
    shape, layout = shape_of_stage(config, name), layout_of_stage(config, name)
    step = step_time(shape, layout, gpu, teacher=teaching_of_stage(config, name))
    waited = served_seconds(config, name, gpu) - step.seconds
    return replace(step, teacher=waited) if waited > 0 else step


def fullest_of(config: RunConfig) -> tuple[str, StageMemory] | None:
    """The training stage that needs most of a GPU; None where none trains, or none on so many nodes."""
    needed = [(name, memory_of_stage(config, name)) for name in trainings_of(config) if is_here(config, name)]
    return max(needed, key=lambda each: each[1].needed, default=None)


def layout_of_stage(config: RunConfig, name: str) -> Layout:
    """The layout of a training stage of a resolved configuration."""
    data = config.engine.mesh.data
    assert data is not None, "the mesh is resolved first"
    return layout_of(config.engine, trainings_of(config)[name], data=data)


def with_layout(config: RunConfig, name: str, layout: Layout) -> RunConfig:
    """The same with this layout for everything, and its micro-batch for the stage."""
    engine = replace(
        config.engine,
        mesh=replace(
            config.engine.mesh,
            tensor=layout.tensor,
            context=layout.context,
            pipeline=layout.pipeline,
            virtual_pipeline=layout.virtual_pipeline,
            data=layout.data,
            expert=layout.expert,
        ),
        sequence_parallel=layout.sequence_parallel,
        zero_stage=_zero_stage(layout),
        recompute=_recompute(layout),
        offload_activations=layout.offload_activations,
        offload_optimizer=layout.offload,
        offload_directory=config.engine.offload_directory or (A_DIRECTORY if layout.offload == "nvme" else None),
    )
    stage = config.stages[name]
    training = replace(trainings_of(config)[name], micro_batch=layout.micro_batch)
    return replace(
        config,
        engine=engine,
        # Whichever of the stages it is, it has a training.
        stages={**config.stages, name: replace(stage, training=training)},  # type: ignore[arg-type]
    )


def refusal(config: RunConfig, name: str, layout: Layout) -> str | None:
    """Why the rules refuse a layout, or None."""
    at = with_layout(config, name, layout)
    found = (problem for rule in LAYOUT_RULES for problem in rule(at, NOBODY))
    return next((problem.path for problem in found), None)


def refusal_in_place(config: RunConfig, name: str, layout: Layout) -> str | None:
    """The same, and none that changes what is trained: smaller models take shapes that the axes divide."""
    models, chunks = models_of(config), layout.pipeline * layout.virtual_pipeline
    # A shape that the axes do not divide would be another one. Most layouts end here, before any rule is asked.
    if any(model.num_layers % chunks or model.num_kv_heads % layout.tensor for model in models.values()):
        return "models"
    reason = refusal(config, name, layout)
    if reason is None and models_of(with_layout(config, name, layout)) != models:
        return "models"
    return reason


def _recompute(layout: Layout) -> Literal["none", "selective", "full"]:
    """The engine's name: its selective recomputation is that of the feed-forward layers."""
    return "selective" if layout.recompute == "mlp" else layout.recompute


def _zero_stage(layout: Layout) -> Literal[0, 1, 2, 3]:
    stages: dict[Sharding, Literal[0, 1, 2, 3]] = {"none": 0, "zero1": 1, "zero2": 2, "zero3": 3}
    return stages[layout.sharding]


def overrides_to(config: RunConfig, name: str, layout: Layout) -> str:
    """What to type for a layout: the keys that differ."""
    now, then = layout_of_stage(config, name), layout
    at_directory = with_layout(config, name, layout).engine.offload_directory
    keys = {
        "engine.mesh.tensor": (now.tensor, then.tensor),
        "engine.mesh.context": (now.context, then.context),
        "engine.mesh.pipeline": (now.pipeline, then.pipeline),
        "engine.mesh.virtual_pipeline": (now.virtual_pipeline, then.virtual_pipeline),
        "engine.sequence_parallel": (now.sequence_parallel, then.sequence_parallel),
        "engine.mesh.expert": (now.expert, then.expert),
        "engine.zero_stage": (_zero_stage(now), _zero_stage(then)),
        "engine.recompute": (_recompute(now), _recompute(then)),
        "engine.offload_activations": (now.offload_activations, then.offload_activations),
        "engine.offload_optimizer": (now.offload, then.offload),
        "engine.offload_directory": (config.engine.offload_directory, at_directory),
        f"stages.{name}.training.micro_batch": (now.micro_batch, then.micro_batch),
    }
    return " ".join(f"{key}={_typed(new)}" for key, (old, new) in keys.items() if old != new)


def _typed(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A layout in which all stages fit, where they do not in the configured one."""

    overrides: str
    worst: StageMemory
    """Of the fullest stage then."""
    seconds: float
    """Of a step."""


def task_of(config: RunConfig, name: str, gpu: Gpu) -> Task:
    """The search for a stage: everything but the batch, the sequence, the precision and the software is open."""
    layout = layout_of_stage(config, name)
    return Task(
        shape=shape_of_stage(config, name),
        teacher=teaching_of_stage(config, name),
        gpu=gpu,
        num_gpus=layout.num_gpus,
        global_batch=layout.global_batch,
        sequence=layout.sequence,
        precisions=(layout.precision,),
        engines=((layout.stack, layout.sharding if layout.sharding != "none" else "zero1"),),
        offload=layout.offload,
        offload_activations=layout.offload_activations,
        recompute=("none", "mlp", "full"),
    )


def changes_that_fit(config: RunConfig, name: str, gpu: Gpu, *, below: float = math.inf, most: int = 3) -> list[Change]:
    """Layouts of the same GPUs in which all stages fit: the fastest with one thing changed, then the best of all.

    Args:
        config: resolved.
        name: the stage whose micro-batch and speed count.
        gpu: what every stage must fit.
        below: bytes that the named stage may need at most.
        most: changes looked for.
    """
    changes = (_change(config, name, gpu, layout, below) for layout in _neighbours(layout_of_stage(config, name)))
    found = sorted((change for change in changes if change is not None), key=lambda change: change.seconds)
    if any("engine.offload_optimizer=cpu" in change.overrides for change in found):
        found = [change for change in found if "engine.offload_optimizer=nvme" not in change.overrides]
    if len(found) < most:
        roomy = replace(gpu, memory_bytes=min(gpu.memory_bytes, below))
        front = search(task_of(config, name, roomy), partial(refusal_in_place, config, name)).front
        changes = (_change(config, name, gpu, each.layout, below) for each in front)
        found += [change for change in changes if change is not None]
    return _smallest(found)[:most]


def _smallest(changes: list[Change]) -> list[Change]:
    """Those that do not type all of another one before them, and more."""
    kept: list[Change] = []
    for change in changes:
        words = set(change.overrides.split())
        if not any(words >= set(other.overrides.split()) for other in kept):
            kept.append(change)
    return kept


def _change(config: RunConfig, name: str, gpu: Gpu, layout: Layout, below: float) -> Change | None:
    if refusal_in_place(config, name, layout) is not None:
        return None
    at = with_layout(config, name, layout)
    fullest = fullest_of(at)
    assert fullest is not None, "the stage itself trains"
    worst = fullest[1]
    if worst.needed > gpu.memory_bytes or memory_of_stage(at, name).needed > below:
        return None
    if worst.host > HOST_BYTES or worst.disk_optimizer > DISK_BYTES:
        return None
    overrides = overrides_to(config, name, layout)
    return Change(overrides=overrides, worst=worst, seconds=step_of_stage(at, name, gpu).seconds)


def _neighbours(layout: Layout) -> Iterator[Layout]:
    """Layouts with one thing changed, each of which needs less memory."""
    if layout.sharding == "none":
        yield replace(layout, sharding="zero1")
    if layout.micro_batch > 1:
        yield replace(layout, micro_batch=layout.micro_batch // 2)
        yield replace(layout, micro_batch=1)
    recomputes: tuple[Recompute, ...] = ("mlp", "full")
    for recompute in recomputes:
        if layout.recompute not in (recompute, "full"):
            yield replace(layout, recompute=recompute)
    if not layout.offload_activations:
        yield replace(layout, offload_activations=True)
    if layout.offload == "none":
        yield replace(layout, offload="cpu")
    if layout.offload != "nvme":
        yield replace(layout, offload="nvme")
    for factor in (2, 4, 8):
        data, left = divmod(layout.data, factor)
        if left == 0:
            yield replace(layout, tensor=layout.tensor * factor, data=data, sequence_parallel=True)
            yield replace(layout, pipeline=layout.pipeline * factor, data=data)
            yield replace(layout, pipeline=layout.pipeline * factor, data=data, virtual_pipeline=1)
            yield replace(layout, context=layout.context * factor, data=data)


def told_memory(config: RunConfig, gpu: Gpu) -> str | None:
    """That the fullest stage does not fit, its memory by part, and three changes with which all would; or None."""
    fullest = fullest_of(config)
    if fullest is None or fullest[1].needed <= gpu.memory_bytes:
        return None
    name, worst = fullest
    parts = ", ".join(f"{part} {byte_size(size)}" for part, size in worst.parts.items())
    changes = changes_that_fit(config, name, gpu)
    told = (f"{change.overrides} ({byte_size(change.worst.needed)})" for change in changes)
    return (
        f"{rules_layout.mesh_of(config)} needs {byte_size(worst.needed)} a GPU for '{name}', and {gpu.name} has "
        f"{byte_size(gpu.memory_bytes)}. Pipeline rank {worst.stage} is the fullest: {parts}. "
        + (f"These would fit: {'; '.join(told)}." if changes else nothing_fits(config, name, gpu))
    )


def nothing_fits(config: RunConfig, name: str, gpu: Gpu) -> str:
    """What to do where no layout of these GPUs fits: the smallest cluster that does, or the closest there is."""
    task = task_of(config, name, gpu)
    closest = search(task).leanest
    smallest = smallest_cluster(task)
    if closest is None:
        told = (
            f"No layout divides {task.num_gpus} GPUs, {task.global_batch} sequences a step and the model: sequences "
            "must be a multiple of the data ranks"
        )
    else:
        told = (
            f"No layout of {task.num_gpus} {gpu.name} holds this model; the closest needs "
            f"{byte_size(closest.needed)} a GPU"
        )
    if smallest is not None:
        return f"{told}. The smallest cluster that does has {smallest} of them."
    return f"{told}, and no larger cluster of them does with {task.global_batch} sequences a step; use another GPU."
