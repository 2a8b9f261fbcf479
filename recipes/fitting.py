"""What would have fitted: changes to a run that ran out of memory, judged by the planner's memory model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from conf.schema import EngineConfig, PretrainStage, RunConfig, SpecialiseStage, TrainingConfig
from parallel.plan.layout import MEGATRON, Layout
from parallel.plan.memory import GIB, memory
from parallel.plan.shapes import shape_of
from recipes import rules_layout
from recipes.machine import Machine

NUM_CHANGES = 3
WORTH_TRYING = 0.9
"""Of what the model says is needed now: where it said that this would fit, a change must at least save something."""

Change = Callable[[RunConfig, str], tuple[str, RunConfig] | None]
"""From a configuration and a stage to the overrides to type and what they make of it; None where it cannot be."""


@dataclass(frozen=True, slots=True)
class Fitting:
    """Overrides that would make a stage fit, and the memory a rank would need."""

    overrides: str
    needed_bytes: float


def advice(config: RunConfig, stage: str, capacity_bytes: int) -> str:
    """Lines for somebody whose stage ran out of memory on devices of `capacity_bytes`."""
    now = needed_bytes(config, stage)
    found = changes_that_fit(config, stage, capacity_bytes)
    has = f"{capacity_bytes / GIB:.1f} GiB"
    lines = [f"The memory model puts this stage at {now / GIB:.1f} GiB a rank, and a device has {has}."]
    if now <= capacity_bytes:
        lines.append("By that it should fit: look for other processes on the device first.")
    if not found:
        lines.append("No change to batch, recomputation or axes on these ranks would fit; it takes more ranks.")
    else:
        lines.append("Would fit:")
        lines += [f"  {change.overrides}   ({change.needed_bytes / GIB:.1f} GiB a rank)" for change in found]
    return "\n".join(lines)


def changes_that_fit(config: RunConfig, stage: str, capacity_bytes: float) -> list[Fitting]:
    """Up to three changes, fewest overrides first, each valid by the rules of layouts.

    Args:
        config: with a resolved mesh.
        stage: the one that must fit.
        capacity_bytes: of a device.
    """
    limit = min(capacity_bytes, WORTH_TRYING * needed_bytes(config, stage))
    found: list[Fitting] = []
    used: list[frozenset[Change]] = []
    for size in range(1, len(CHANGES) + 1):
        for changes in combinations(CHANGES, size):
            if any(smaller <= set(changes) for smaller in used):
                continue
            changed = _apply(changes, config, stage)
            if changed is None or any(_faults(changed[1])):
                continue
            needed = needed_bytes(changed[1], stage)
            if needed <= limit:
                found.append(Fitting(changed[0], needed))
                used.append(frozenset(changes))
            if len(found) == NUM_CHANGES:
                return found
    return found


def needed_bytes(config: RunConfig, stage: str) -> float:
    """What the fullest rank of a training stage needs, by the memory model."""
    engine, training = config.engine, _training(config, stage)
    stages = memory(shape_of(config.model), _layout(engine, training))
    # The model counts activations of two bytes an element.
    twice = engine.weight_precision == "fp32"
    return max(each.needed + (each.activations if twice else 0.0) for each in stages)


def _layout(engine: EngineConfig, training: TrainingConfig) -> Layout:
    mesh = engine.mesh
    assert mesh.data is not None, "the mesh is resolved before launch"
    single = engine.weight_precision == "fp32"
    return Layout(
        tensor=mesh.tensor,
        context=mesh.context,
        pipeline=mesh.pipeline,
        virtual_pipeline=mesh.virtual_pipeline,
        data=mesh.data,
        micro_batch=training.micro_batch,
        global_batch=training.global_batch,
        sequence=training.sequence_length,
        recompute=engine.recompute,
        expert=mesh.expert,
        sharding="none" if engine.zero_stage == 0 else "zero1",
        sequence_parallel=engine.sequence_parallel,
        stack=replace(MEGATRON, state_bytes=8, optimizer_bytes=8) if single else MEGATRON,
        chunked_loss=True,
    )


def _apply(changes: tuple[Change, ...], config: RunConfig, stage: str) -> tuple[str, RunConfig] | None:
    overrides: dict[str, str] = {}
    for change in changes:
        changed = change(config, stage)
        if changed is None:
            return None
        text, config = changed
        overrides |= dict(word.split("=") for word in text.split())
    return " ".join(f"{key}={value}" for key, value in overrides.items()), config


def _faults(config: RunConfig) -> Iterator[object]:
    nowhere = Machine(cores=1, memory_bytes=0)  # rules of layouts do not look at the machine
    for rule in rules_layout.RULES:
        yield from rule(config, nowhere)


def _training(config: RunConfig, stage: str) -> TrainingConfig:
    found = config.stages[stage]
    assert isinstance(found, PretrainStage | SpecialiseStage), "only these train"
    return found.training


def _halve_micro_batch(config: RunConfig, stage: str) -> tuple[str, RunConfig] | None:
    found = config.stages[stage]
    assert isinstance(found, PretrainStage | SpecialiseStage), "only these train"
    if found.training.micro_batch % 2:
        return None
    half = replace(found.training, micro_batch=found.training.micro_batch // 2)
    changed = replace(found, training=half)
    text = f"stages.{stage}.training.micro_batch={half.micro_batch}"
    return text, replace(config, stages={**config.stages, stage: changed})


def _shard_optimizer(config: RunConfig, stage: str) -> tuple[str, RunConfig] | None:
    if config.engine.zero_stage:
        return None
    return "engine.zero_stage=1", _with_engine(config, zero_stage=1)


def _recompute(config: RunConfig, stage: str) -> tuple[str, RunConfig] | None:
    if config.engine.recompute == "full":
        return None
    return "engine.recompute=full", _with_engine(config, recompute="full")


def _more_tensor_ranks(config: RunConfig, stage: str) -> tuple[str, RunConfig] | None:
    changed = _from_data_ranks(config, "tensor")
    if changed is None or config.engine.sequence_parallel:
        return changed
    text, config = changed
    return f"{text} engine.sequence_parallel=true", _with_engine(config, sequence_parallel=True)


def _more_pipeline_ranks(config: RunConfig, stage: str) -> tuple[str, RunConfig] | None:
    return _from_data_ranks(config, "pipeline")


def _more_context_ranks(config: RunConfig, stage: str) -> tuple[str, RunConfig] | None:
    return _from_data_ranks(config, "context")


def _from_data_ranks(config: RunConfig, axis: str) -> tuple[str, RunConfig] | None:
    mesh = config.engine.mesh
    assert mesh.data is not None, "the mesh is resolved before launch"
    if mesh.data % 2:
        return None
    size = 2 * getattr(mesh, axis)
    changed = replace(mesh, **{axis: size, "data": mesh.data // 2})
    text = f"engine.mesh.{axis}={size} engine.mesh.data={mesh.data // 2}"
    return text, _with_engine(config, mesh=changed)


def _with_engine(config: RunConfig, **changes: object) -> RunConfig:
    return replace(config, engine=replace(config.engine, **changes))  # type: ignore[arg-type]


# Cheapest in speed first.
CHANGES: tuple[Change, ...] = (
    _shard_optimizer,
    _halve_micro_batch,
    _more_tensor_ranks,
    _recompute,
    _more_pipeline_ranks,
    _more_context_ranks,
)
