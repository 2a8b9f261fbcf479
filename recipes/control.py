"""Train what a claim is compared with: on cross-entropy alone, from an earlier model or from fresh weights."""

from __future__ import annotations

from dataclasses import replace

from conf.schema import ControlStage, TrainingConfig
from parallel.initial import InitialWeights
from recipes.pretrain import train_stage
from recipes.recover import forward_flops
from recipes.stage import StageInput, StageOutput, parent_of


def train_control(given: StageInput, stage: ControlStage) -> StageOutput:
    """Train on the labels for the tokens, or the FLOPs, of what it is compared with."""
    origin = given.open_model(stage.model)
    model = origin.manifest.provenance.model
    training = stage.training
    if stage.flops_of is not None:
        training = at_equal_flops(given, training, stage.flops_of)
    return train_stage(
        given,
        training,
        model,
        initial=InitialWeights(model, given.context.config.seed) if stage.fresh else origin.weights,
        parents=() if stage.fresh else (parent_of(origin),),
    )


def at_equal_flops(given: StageInput, training: TrainingConfig, other: str) -> TrainingConfig:
    """The training of a distilling stage's student without its teacher, for as many FLOPs as with it."""
    distilled = given.context.config.stages[other]
    student = given.open_model(other).manifest.provenance.model
    teacher = given.open_model(distilled.distillation.teacher).manifest.provenance.model  # type: ignore[union-attr]
    length = training.sequence_length
    own = student.train_flops_per_token(length)
    tokens = distilled.training.tokens * (own + forward_flops(teacher, length)) / own  # type: ignore[union-attr]
    return replace(training, tokens=round(tokens))
