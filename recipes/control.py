"""Train what a claim is compared with: on cross-entropy alone, from an earlier model or from fresh weights."""

from __future__ import annotations

from conf.schema import ControlStage, TrainingConfig
from parallel.initial import InitialWeights
from recipes.pretrain import train_stage
from recipes.stage import StageInput, StageOutput, parent_of
from recipes.stage_models import at_equal_flops


def train_control(given: StageInput, stage: ControlStage) -> StageOutput:
    """Train on the labels for the tokens, or the FLOPs, of what it is compared with."""
    origin = given.open_model(stage.model)
    model = origin.manifest.provenance.model
    training = stage.training
    if stage.flops_of is not None:
        training = at_flops_of(given, training, stage.flops_of)
    return train_stage(
        given,
        training,
        model,
        initial=InitialWeights(model, given.context.config.seed) if stage.fresh else origin.weights,
        parents=() if stage.fresh else (parent_of(origin),),
    )


def at_flops_of(given: StageInput, training: TrainingConfig, other: str) -> TrainingConfig:
    """The training for the FLOPs of a distilling stage, from the models there are."""
    distilled = given.context.config.stages[other]
    student = given.open_model(other).manifest.provenance.model
    teacher = given.open_model(distilled.distillation.teacher).manifest.provenance.model  # type: ignore[union-attr]
    return at_equal_flops(training, distilled.training, student=student, teacher=teacher)  # type: ignore[union-attr]
