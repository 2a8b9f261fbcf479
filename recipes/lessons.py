"""What a student learns from: a teacher in its own processes or on other ranks, or what one said once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from conf.errors import CheckpointError
from conf.schema import DistillationConfig, ModelConfig, ServiceConfig, TrainingConfig
from data.batch import Batch
from data.logits import StoredLogits
from data.logits_server import ServedLogits
from data.shards import Access
from parallel.device import this_device
from parallel.distillation import Distillation, FromReader, FromTeacher
from parallel.engine import Engine, Match, make_engine
from parallel.memory_errors import naming_memory_errors
from parallel.mesh import Coordinate
from recipes.board import Board
from recipes.pretrain import Lesson, mesh_of
from recipes.recording import about_data, about_text, location_of, manifest_of
from recipes.serving import mesh_of_service
from recipes.stage import StageInput
from recipes.stage_models import forward_flops
from train.checkpoint import Checkpoint
from train.metrics import MetricsWriter


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
            yield Lesson(FromReader(stored, objective, mesh_of(given), this_device(), training.global_batch), 0.0)
        return
    if distillation.service is not None:
        with _teacher_elsewhere(given, distillation.service, training, objective) as lesson:
            yield Lesson(lesson, 0.0)
        return
    model = teacher.manifest.provenance.model
    with teacher_engine(given, teacher, training.micro_batch) as engine:
        match = _match(given, engine, distillation, student=student, teacher=model)
        yield Lesson(
            FromTeacher(engine, objective, distillation.top_k), forward_flops(model, training.sequence_length), match
        )


@contextmanager
def teacher_engine(given: StageInput, teacher: Checkpoint, micro_batch: int) -> Iterator[Engine]:
    """The teacher on the run's mesh, in the same processes: what it says of a micro-batch is where it is needed.

    It keeps neither gradients nor an optimizer.
    """
    config = replace(given.context.config.engine, recompute="none")
    model = teacher.manifest.provenance.model
    with naming_memory_errors("building the teacher"):
        engine = make_engine(model, config, None, mesh_of(given), micro_batch=micro_batch)
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


@dataclass(slots=True)
class FromService:
    """Objectives of a step from a teacher on other ranks, which is told of the step so that it goes on.

    Attributes:
        lesson: from what it says.
        stage: that learns.
        board: where it is told, on one of the students' ranks; None on others.
        began: it was told where to begin.
    """

    lesson: FromReader
    stage: str
    board: Board | None
    began: bool = False

    def __call__(self, micro_batches: Sequence[Batch]) -> list[Distillation]:
        """One objective a micro-batch."""
        step = int(micro_batches[0].sample_ids_B[0]) // self.lesson.samples_per_step
        if not self.began:
            self.begin(step)
        if self.board is not None:
            # Every rank has taken the step before: they agree on its outcome.
            self.board.ask(self.stage, step)
        return self.lesson(micro_batches)

    def begin(self, step: int) -> None:
        """Tell it the first step."""
        self.began = True
        if self.board is not None:
            self.board.begin(self.stage, step)


@contextmanager
def _teacher_elsewhere(
    given: StageInput, service: ServiceConfig, training: TrainingConfig, objective: Distillation
) -> Iterator[FromService]:
    board, mesh = Board(given.context.place), mesh_of(given)
    # One that hears the teacher, so that what it waits is told.
    speaker = mesh.rank(Coordinate(pipeline=mesh.pipeline - 1, data=0, context=0, tensor=0))
    speaks = given.context.place.rank == speaker
    if speaks:
        board.open_lesson(given.name)
    said = ServedLogits(
        board.servers(mesh_of_service(service).data),
        manifest_of(given.context.config, given.name, service.sent_as, {}),
        stage=given.name,
        samples_per_step=training.global_batch,
    )
    reader = FromReader(said, objective, mesh, this_device(), training.global_batch)
    lesson = FromService(reader, given.name, board if speaks else None)
    try:
        yield lesson
    finally:
        if not lesson.began:
            lesson.begin(training.num_steps)
        said.close()
        if speaks:
            text = f"stage {given.name}: waited {said.waited_seconds:.1f} s in all for the teacher"
            MetricsWriter(given.context.run.metrics_file).write("message", level="info", text=text)


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
