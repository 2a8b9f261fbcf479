"""Distil a much smaller student from an earlier model, from fresh weights or cut out of the teacher."""

from __future__ import annotations

from pathlib import Path

from conf.schema import DistillStage, ModelConfig
from parallel.engine import TensorSource
from parallel.initial import InitialWeights
from parallel.shapes import student_shape
from recipes.lessons import taught_by
from recipes.pretrain import train_stage
from recipes.prune import importance_of, pruned_weights, with_shape
from recipes.stage import StageInput, StageOutput, parent_of
from recipes.stage_models import grid_of
from train.checkpoint import Checkpoint


def distill(given: StageInput, stage: DistillStage) -> StageOutput:
    """Train the student on the teacher's logits.

    Raises:
        CheckpointError: the teacher has another tokenizer than this run's data.
        DataError: calibration text is text that models are evaluated on.
    """
    teacher = given.open_model(stage.distillation.teacher)
    shape = shape_of_student(given, stage, teacher.manifest.provenance.model)
    initial = weights_of_student(given, stage, teacher, shape)
    with taught_by(given, teacher, stage.distillation, stage.training, shape) as lesson:
        return train_stage(
            given,
            stage.training,
            shape,
            initial=initial,
            parents=(parent_of(teacher),),
            lesson=lesson,
        )


def shape_of_student(given: StageInput, stage: DistillStage, teacher: ModelConfig) -> ModelConfig:
    """The shape that is given, else one with the asked-for share of the teacher's parameters."""
    student = stage.student
    if student.shape is not None:
        return with_shape(teacher, student.shape)
    return student_shape(teacher, student.ratio, grid_of(given.context.config, student))


def weights_of_student(given: StageInput, stage: DistillStage, teacher: Checkpoint, shape: ModelConfig) -> TensorSource:
    """What the student starts from; a stage that continues from its own checkpoint does not need it."""
    resumes: list[Path] = list(given.context.run.checkpoints(given.name).glob("step-*"))
    if stage.student.start == "fresh" or resumes:
        return InitialWeights(shape, given.context.config.seed)
    return pruned_weights(teacher, importance_of(given, teacher, "activation", stage.student.calibration), shape)
