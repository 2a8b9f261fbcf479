"""A teacher on ranks of its own: what those ranks run. Its students' side is in `lessons.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NoReturn

from data.batch import Batch
from data.logits import LogitsManifest
from data.logits_server import LogitsServer
from data.prefetch import Prefetch
from data.stream import stream_of_stage
from parallel.distillation import read_likeliest
from parallel.divergence import TeacherLogits
from parallel.engine import Engine, Logits
from parallel.groups import default_store
from recipes.board import Board
from recipes.lessons import teacher_engine
from recipes.logits import ask, hands_on
from recipes.recording import learner_of, manifest_of
from recipes.rules_layout import mesh_of
from recipes.stage import StageInput, open_datasets
from train.data_gate import data_gate
from train.loop import PREFETCH_STEPS
from train.shared_stream import SharedStream
from train.worker import RankContext


def teach(context: RankContext) -> NoReturn:
    """Teach every stage that the students come to; never returns: these ranks are ended when the students' have."""
    datasets = open_datasets(context.run, context.config.data)
    board, mesh = Board(context.place), mesh_of(context.config)
    here, server = mesh.coordinate(context.place.rank), None
    if hands_on(mesh, here):
        server = LogitsServer(context.place.address)
        board.open_server(here.data, server.address)
    for number in count():
        given = StageInput(context=context, name=board.lesson(number), incoming=None, datasets=datasets)
        teach_stage(given, board, server)
    raise AssertionError("there is always a next lesson")


def teach_stage(given: StageInput, board: Board, server: LogitsServer | None) -> None:
    """Say what a stage's teacher says of its text, from the step that the students go on from to the last.

    Args:
        given: the stage; the configuration's engine is the teacher's.
        board: where the students say how far they are.
        server: holds what is said, on ranks that hand it on.

    Raises:
        CheckpointError: the teacher has another tokenizer than this run's data.
        DataError: text cannot be read.
    """
    config, name = given.context.config, given.name
    training, distillation = learner_of(config, name)
    service = distillation.service
    assert service is not None, "the students ask"
    stream, place = stream_of_stage(config, name, given.datasets), given.context.place
    sources = [given.datasets[source] for source in training.sources]
    gate = data_gate(default_store(), name, sources, place=place, say=print)
    teacher = given.open_model(distillation.teacher)
    with teacher_engine(given, teacher, training.micro_batch) as engine:
        shared = SharedStream(stream, engine.mesh, place, default_store(), name)

        def batches_of(step: int) -> list[Batch]:
            try:
                return shared.batches(step)
            finally:
                if gate is not None:
                    gate.arrive(step)

        def give_up() -> None:
            shared.give_up()
            for dataset in given.datasets.values():
                dataset.give_up()

        speaker = Speaker(
            engine=engine,
            board=board,
            server=server,
            stage=name,
            manifest=manifest_of(config, name, service.sent_as, {}),
            samples_per_step=training.global_batch,
            steps_ahead=service.steps_ahead,
            read=read_likeliest(distillation.temperature, distillation.top_k),
        )
        steps = range(board.first_step(name), training.num_steps)
        with Prefetch(batches_of, steps, depth=PREFETCH_STEPS, interrupt=give_up) as batches:
            for step in steps:
                speaker.wait_for_turn(step, steps.start)
                if gate is not None:
                    gate.opens(step, lambda: False)
                speaker.speak(next(batches))
        shared.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Speaker:
    """One rank's part in what a teacher says of a stage's text; every rank of it does the same.

    Attributes:
        engine: the teacher.
        board: where the students say how far they are.
        server: holds what is said, on ranks that hand it on.
        stage: that learns.
        manifest: of its samples.
        samples_per_step: over all data ranks.
        steps_ahead: of the students, at most.
        read: keeps the likeliest tokens.
    """

    engine: Engine
    board: Board
    server: LogitsServer | None
    stage: str
    manifest: LogitsManifest
    samples_per_step: int
    steps_ahead: int
    read: Callable[[Logits], TeacherLogits]

    def wait_for_turn(self, step: int, first_step: int) -> None:
        """Wait until a step is not too far ahead, and drop what no student will ask for any more."""
        begun = step - self.steps_ahead
        if begun >= first_step:
            self.board.wait_until_asked(self.stage, begun)
        if self.server is not None:
            self.server.forget(self.stage, before=max(begun, first_step) * self.samples_per_step)

    def speak(self, micro_batches: Sequence[Batch]) -> None:
        """Ask the teacher about its data rank's share of a step, and have the answer for who wants it."""
        said = ask(self.engine, micro_batches, self.read)
        if self.server is not None:
            for first_sample, likeliest in said:
                self.server.hold(self.stage, first_sample, likeliest, self.manifest)
