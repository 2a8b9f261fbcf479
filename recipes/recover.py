"""Distil the incoming model from an earlier one, as a pruned model from the one it was cut out of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from conf.schema import DistillationConfig, RecoverStage, TrainingConfig
from parallel.distillation import Distillation, FromTeacher
from parallel.engine import make_engine
from recipes.pretrain import Lesson, mesh_of, train_stage
from recipes.stage import StageInput, StageOutput, parent_of
from recipes.stage_models import forward_flops
from train.checkpoint import Checkpoint


def recover(given: StageInput, stage: RecoverStage) -> StageOutput:
    """Train the incoming model on the teacher's logits.

    Raises:
        CheckpointError: either model has another tokenizer than this run's data.
    """
    student, teacher = given.open_incoming(), given.open_model(stage.distillation.teacher)
    with taught_by(given, teacher, stage.distillation, stage.training) as lesson:
        return train_stage(
            given,
            stage.training,
            student.manifest.provenance.model,
            initial=student.weights,
            parents=(parent_of(student), parent_of(teacher)),
            lesson=lesson,
        )


@contextmanager
def taught_by(
    given: StageInput, teacher: Checkpoint, distillation: DistillationConfig, training: TrainingConfig
) -> Iterator[Lesson]:
    """The teacher on the student's mesh, in the same processes: the logits of a micro-batch are where they are needed.

    It keeps neither gradients nor an optimizer, and only the logits of the micro-batches of one step.
    """
    config = replace(given.context.config.engine, recompute="none")
    model = teacher.manifest.provenance.model
    engine = make_engine(model, config, None, mesh_of(given), micro_batch=training.micro_batch)
    try:
        engine.load_weights(teacher.weights)
        objective = Distillation(
            divergence=distillation.divergence, weight=distillation.weight, temperature=distillation.temperature
        )
        yield Lesson(FromTeacher(engine, objective, distillation.top_k), forward_flops(model, training.sequence_length))
    finally:
        engine.close()
