"""Distil the incoming model from an earlier one, as a pruned model from the one it was cut out of."""

from __future__ import annotations

from conf.schema import RecoverStage
from recipes.lessons import taught_by
from recipes.pretrain import train_stage
from recipes.stage import StageInput, StageOutput, parent_of


def recover(given: StageInput, stage: RecoverStage) -> StageOutput:
    """Train the incoming model on the teacher's logits.

    Raises:
        CheckpointError: either model has another tokenizer than this run's data.
        DataError: what the teacher said was written down of other text.
    """
    student, teacher = given.open_incoming(), given.open_model(stage.distillation.teacher)
    model = student.manifest.provenance.model
    with taught_by(given, teacher, stage.distillation, stage.training, model) as lesson:
        return train_stage(
            given,
            stage.training,
            model,
            initial=student.weights,
            parents=(parent_of(student), parent_of(teacher)),
            lesson=lesson,
        )
