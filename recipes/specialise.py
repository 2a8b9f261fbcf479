"""Continue training the incoming model on a domain."""

from __future__ import annotations

from conf.schema import SpecialiseStage
from recipes.pretrain import train_stage
from recipes.stage import StageInput, StageOutput
from train.checkpoint import Parent


def specialise(given: StageInput, stage: SpecialiseStage) -> StageOutput:
    """Train on from the incoming weights, with a fresh optimizer.

    Raises:
        CheckpointError: the incoming model has another shape or tokenizer than this run.
    """
    checkpoint = given.open_incoming()
    model = given.context.config.model
    checkpoint.require_model(model)
    parent = Parent(path=str(checkpoint.path), manifest_sha256=checkpoint.manifest_sha256)
    return train_stage(given, stage.kind, stage.training, model, initial=checkpoint.weights, parents=(parent,))
