"""The models of a recipe's stages before any of them exists: what each trains, and what it learns from.

Arithmetic over the configuration, for rules and plans. A pruning stage that searches is given the largest shape that
holds its target. Names that no earlier stage has are refused by `rules_compression.py`; here they stand for the
recipe's model, so that the other rules can be asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from conf.schema import (
    ControlStage,
    DistillationConfig,
    DistillStage,
    GridConfig,
    ModelConfig,
    PruneStage,
    QuantiseStage,
    RecoverStage,
    RunConfig,
    SearchConfig,
    ShapeConfig,
    StageConfig,
    TrainingConfig,
    TrainingStage,
)
from parallel.shapes import Cut, Grid, Measure, shapes_that_hold, student_shape
from recipes.rules_layout import trainings_of


def makes_a_model(stage: StageConfig | None) -> bool:
    """Whether other stages can name its model."""
    return isinstance(stage, TrainingStage | PruneStage | QuantiseStage)


def is_control(stage: StageConfig) -> bool:
    """Whether a stage's model is made to be compared with, and the recipe goes on with the one it had."""
    return isinstance(stage, ControlStage) or (isinstance(stage, PruneStage | QuantiseStage) and stage.control)


def passes_on(stage: StageConfig) -> bool:
    """Whether the recipe goes on with what the stage makes; not so with what was made to compare with, or for INT8."""
    return not is_control(stage) and not isinstance(stage, QuantiseStage)


def stages_of(config: RunConfig) -> Iterator[tuple[str, StageConfig]]:
    """Stages of the order that exist, in it."""
    return ((name, config.stages[name]) for name in config.order if name in config.stages)


def distillation_of(stage: StageConfig) -> DistillationConfig | None:
    """How a stage learns from a teacher, where it does."""
    return stage.distillation if isinstance(stage, RecoverStage | DistillStage) else None


def given_shapes(config: RunConfig) -> dict[str, ShapeConfig]:
    """Path -> shape, where one is given."""
    found = {}
    for name, stage in stages_of(config):
        if isinstance(stage, PruneStage) and stage.shape is not None:
            found[f"stages.{name}.shape"] = stage.shape
        elif isinstance(stage, DistillStage) and stage.student.shape is not None:
            found[f"stages.{name}.student.shape"] = stage.student.shape
    return found


def grid_of(config: RunConfig, wanted: GridConfig) -> Grid:
    """Shapes that are wanted and that the run's mesh can hold, and its precision multiply."""
    mesh, multiple = config.engine.mesh, config.engine.product_multiple
    return Grid(
        hidden_multiple=math.lcm(wanted.hidden_multiple, multiple),
        ffn_multiple=math.lcm(wanted.ffn_multiple, multiple * mesh.tensor),
        kv_heads_multiple=math.lcm(wanted.kv_heads_multiple, mesh.tensor),
        layers_multiple=math.lcm(wanted.layers_multiple, mesh.pipeline * mesh.virtual_pipeline),
        experts_multiple=math.lcm(wanted.experts_multiple, mesh.expert) if isinstance(wanted, SearchConfig) else 1,
    )


def model_of_stage(config: RunConfig, name: str) -> ModelConfig:
    """The model a stage trains or makes."""
    return models_of(config)[name]


def teacher_of_stage(config: RunConfig, name: str) -> ModelConfig | None:
    """The model a stage learns from, where it learns from one."""
    distillation = distillation_of(config.stages[name])
    return None if distillation is None else models_of(config).get(distillation.teacher, config.model)


def training_of_stage(config: RunConfig, name: str) -> TrainingConfig:
    """The training of a stage, for the FLOPs of another where it is asked to take those."""
    training, stage = trainings_of(config)[name], config.stages[name]
    if not isinstance(stage, ControlStage) or stage.flops_of not in trainings_of(config):
        return training
    teacher = teacher_of_stage(config, stage.flops_of)
    if teacher is None:
        return training
    distilled, student = trainings_of(config)[stage.flops_of], model_of_stage(config, stage.flops_of)
    return at_equal_flops(training, distilled, student=student, teacher=teacher)


def at_equal_flops(
    training: TrainingConfig, distilled: TrainingConfig, *, student: ModelConfig, teacher: ModelConfig
) -> TrainingConfig:
    """The training of a distilled student without its teacher, for as many FLOPs as with it."""
    length = training.sequence_length
    own = student.train_flops_per_token(length)
    return replace(training, tokens=round(distilled.tokens * (own + forward_flops(teacher, length)) / own))


def forward_flops(model: ModelConfig, sequence_length: int) -> float:
    """Model FLOPs of a forward pass for one token: a third of a training step's."""
    return model.train_flops_per_token(sequence_length) / 3


def models_of(config: RunConfig) -> dict[str, ModelConfig]:
    """Name -> model, of what the recipe starts from (`init`) and of every stage of the order."""
    models = {"init": config.model}
    incoming = config.model
    for name, stage in stages_of(config):
        match stage:
            case PruneStage():
                parent = models.get(stage.model, config.model) if stage.model is not None else incoming
                made = models.get(stage.shape_of, parent) if stage.shape_of else _pruned(config, stage, parent)
            case DistillStage():
                made = _student(config, stage, models.get(stage.distillation.teacher, config.model))
            case ControlStage() | QuantiseStage():
                made = models.get(stage.model, config.model)
            case _:
                made = incoming
        models[name] = made
        incoming = made if passes_on(stage) else incoming
    return models


def _pruned(config: RunConfig, stage: PruneStage, parent: ModelConfig) -> ModelConfig:
    if stage.shape is not None:
        return stage.shape.applied_to(parent)
    search = stage.search
    grid = grid_of(config, search)
    return _largest(parent, search.cut, search.measure, search.removed, grid) or parent


def _student(config: RunConfig, stage: DistillStage, teacher: ModelConfig) -> ModelConfig:
    student = stage.student
    if student.shape is not None:
        return student.shape.applied_to(teacher)
    return _nearest(teacher, student.ratio, grid_of(config, student)) or teacher


@cache
def _largest(parent: ModelConfig, cut: Cut, measure: Measure, removed: float, grid: Grid) -> ModelConfig | None:
    return next(iter(shapes_that_hold(parent, cut=cut, measure=measure, removed=removed, grid=grid)), None)


@cache
def _nearest(teacher: ModelConfig, ratio: float, grid: Grid) -> ModelConfig | None:
    try:
        return student_shape(teacher, ratio, grid)
    except ValueError:
        return None
