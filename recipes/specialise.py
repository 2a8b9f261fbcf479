"""Continue training the incoming model on a domain."""

from __future__ import annotations

from conf.schema import SpecialiseStage
from recipes.pretrain import train_stage
from recipes.stage import StageInput, StageOutput, parent_of


def specialise(given: StageInput, stage: SpecialiseStage) -> StageOutput:
    """Train on from the incoming weights, in the incoming model's shape, with a fresh optimizer.

    Raises:
        CheckpointError: the incoming model has another tokenizer than this run.
    """
    checkpoint = given.open_incoming()
    return train_stage(
        given,
        stage.training,
        checkpoint.manifest.provenance.model,
        initial=checkpoint.weights,
        parents=(parent_of(checkpoint),),
    )
