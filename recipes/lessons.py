"""What a student learns from: a teacher in its own processes, or what a teacher said and was written down."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from conf.errors import CheckpointError
from conf.schema import DistillationConfig, ModelConfig, TrainingConfig
from data.logits import StoredLogits
from data.shards import Access
from parallel.device import this_device
from parallel.distillation import Distillation, FromRecording, FromTeacher
from parallel.engine import Engine, Match, make_engine
from recipes.pretrain import Lesson, mesh_of
from recipes.recording import about_data, about_text, location_of
from recipes.stage import StageInput
from recipes.stage_models import forward_flops
from train.checkpoint import Checkpoint


@contextmanager
def taught_by(
    given: StageInput,
    teacher: Checkpoint,
    distillation: DistillationConfig,
    training: TrainingConfig,
    student: ModelConfig,
) -> Iterator[Lesson]:
    """The lesson of a distilling stage.

    Raises:
        DataError: what was written down is of another teacher or of other text.
        CheckpointError: the models have not the layers whose hidden states are to be learned.
    """
    objective = Distillation(
        divergence=distillation.divergence, weight=distillation.weight, temperature=distillation.temperature
    )
    if distillation.logits is not None:
        with _recording(given, teacher, distillation.logits, training) as stored:
            yield Lesson(FromRecording(stored, objective, mesh_of(given), this_device(), training.global_batch), 0.0)
        return
    model = teacher.manifest.provenance.model
    with teacher_engine(given, teacher, training.micro_batch) as engine:
        lesson = FromTeacher(engine, objective, distillation.top_k)
        match = _match(given, engine, distillation, student=student, teacher=model)
        yield Lesson(lesson, forward_flops(model, training.sequence_length), match)


@contextmanager
def teacher_engine(given: StageInput, teacher: Checkpoint, micro_batch: int) -> Iterator[Engine]:
    """The teacher on the run's mesh, in the same processes: what it says of a micro-batch is where it is needed.

    It keeps neither gradients nor an optimizer.
    """
    config = replace(given.context.config.engine, recompute="none")
    engine = make_engine(teacher.manifest.provenance.model, config, None, mesh_of(given), micro_batch=micro_batch)
    try:
        engine.load_weights(teacher.weights)
        yield engine
    finally:
        engine.close()


@contextmanager
def _recording(given: StageInput, teacher: Checkpoint, logits: str, training: TrainingConfig) -> Iterator[StoredLogits]:
    config = given.context.config
    location = location_of(config, logits, run_dir=str(given.context.run.path))
    # Past the tiers: read once, it would drive out of them what is read again.
    stored = StoredLogits.open(location, Access(storage=config.data.storage))
    try:
        about = about_text(config, given.name) | about_data(given.datasets, training.sources)
        about["teacher"] = teacher.manifest_sha256
        stored.require(about, num_samples=training.num_steps * training.global_batch)
        yield stored
    finally:
        stored.close()


def _match(
    given: StageInput, engine: Engine, distillation: DistillationConfig, *, student: ModelConfig, teacher: ModelConfig
) -> Match | None:
    wanted = distillation.hidden_states
    if wanted is None:
        return None
    missing = [
        f"{mine}: {its}"
        for mine, its in wanted.layers.items()
        if mine >= student.num_layers or its >= teacher.num_layers
    ]
    if missing:
        raise CheckpointError(
            f"stages.{given.name}.distillation.hidden_states.layers has {', '.join(missing)}; the student has "
            f"{student.num_layers} layers and the teacher {teacher.num_layers}, counted from 0."
        )
    return Match(
        pairs=wanted.layers,
        targets=engine.keep_outputs(wanted.layers.values()),
        width=teacher.hidden_size,
        distance=wanted.distance,
        weight=wanted.weight,
        seed=given.context.config.seed,
    )
