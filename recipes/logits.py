"""Write down what the teacher of a later stage says of its text: once, for as many students as there will be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from conf.schema import LogitsStage
from data.batch import Batch
from data.logits import Likeliest, LogitsManifest, LogitsWriter, finish, whole_chunks
from data.storage import Store
from data.stream import stream_of_stage
from parallel.device import this_device
from parallel.distillation import read_likeliest
from parallel.divergence import TeacherLogits
from parallel.engine import Engine, Logits
from parallel.groups import default_store
from parallel.inputs import rows_of_ranks
from parallel.mesh import Coordinate, Mesh
from recipes.lessons import teacher_engine
from recipes.recording import about_data, about_text, learner_of, location_of, manifest_of
from recipes.stage import StageInput, StageOutput
from train.metrics import MetricsWriter
from train.shared_stream import SharedStream

CHUNK_BYTES = 1 << 32
"""Of all ranks together: what a recording that is stopped may lose."""


def record_logits(given: StageInput, stage: LogitsStage) -> StageOutput:
    """Write the recording; one that was stopped goes on after its last whole chunk.

    Raises:
        CheckpointError: the teacher has another tokenizer than this run's data.
        DataError: it cannot be written.
    """
    given.announce(stage.kind)
    config = given.context.config
    training, distillation = learner_of(config, stage.stage)
    teacher = given.open_model(distillation.teacher)
    about = about_text(config, stage.stage) | about_data(given.datasets, training.sources)
    manifest = manifest_of(config, stage.stage, stage.stored_as, about | {"teacher": teacher.manifest_sha256})
    location = location_of(config, given.name, run_dir=str(given.context.run.path))
    store = Store.open(location, config.data.storage)
    stream = stream_of_stage(config, stage.stage, given.datasets)
    with teacher_engine(given, teacher, training.micro_batch) as engine:
        shared = SharedStream(stream, engine.mesh, given.context.place, default_store(), given.name)
        recorder = Recorder(engine, store, manifest, temperature=distillation.temperature)
        finished = recorder.run(
            lambda step: given.reading.of_all_ranks(lambda: shared.batches(step)),
            training.num_steps,
            asked_to_stop=lambda: asked_to_stop(given),
            tell=lambda done: tell(given, done, training.num_steps),
        )
        shared.close()
    return StageOutput("finished" if finished else "stopped", None)


class Recorder:
    """One rank's part of a recording: every rank computes, the first tensor and context rank of each data rank writes.

    Args:
        engine: the teacher.
        store: where to.
        manifest: of the recording.
        temperature: that the teacher's logits are divided by.
    """

    def __init__(self, engine: Engine, store: Store, manifest: LogitsManifest, *, temperature: float) -> None:
        self.engine = engine
        self.store = store
        self.manifest = manifest
        self.read = read_likeliest(temperature, manifest.top_k)
        self.writer = None
        if hands_on(engine.mesh, engine.coordinate):
            self.writer = LogitsWriter(store, manifest, rank=engine.coordinate.data)

    def run(
        self,
        batches_of: Callable[[int], Sequence[Batch]],
        num_steps: int,
        *,
        asked_to_stop: Callable[[], bool],
        tell: Callable[[int], None],
    ) -> bool:
        """Record all steps that are not written down yet, and the manifest; False where it was stopped.

        Args:
            batches_of: this data rank's micro-batches of a step.
            num_steps: of the whole recording.
            asked_to_stop: the same on every rank.
            tell: called with the number of steps that are done, on every rank.
        """
        chunks = self.chunks(num_steps)
        samples = self.manifest.num_samples // num_steps
        whole: list[set[int]] = [set()]
        if dist.get_rank() == 0:
            ranges = {chunk: range(steps.start * samples, steps.stop * samples) for chunk, steps in chunks.items()}
            whole = [whole_chunks(self.store, ranges)]
        dist.broadcast_object_list(whole, src=0)
        for chunk, steps in chunks.items():
            if chunk in whole[0]:
                continue
            for step in steps:
                self.record(batches_of(step), chunk)
                if asked_to_stop():
                    return False
            if self.writer is not None:
                self.writer.end_chunk(chunk)
            tell(steps.stop)
        dist.barrier()
        if dist.get_rank() == 0:
            finish(self.store, self.manifest)
        dist.barrier()
        return True

    def chunks(self, num_steps: int) -> dict[int, range]:
        """Steps of each chunk, whatever the mesh."""
        step_bytes = self.manifest.num_samples // num_steps * self.manifest.sample_bytes
        size = max(1, CHUNK_BYTES // step_bytes)
        starts = range(0, num_steps, size)
        return {chunk: range(first, min(first + size, num_steps)) for chunk, first in enumerate(starts)}

    def record(self, micro_batches: Sequence[Batch], chunk: int) -> None:
        """Ask the teacher about a step's samples and write down what it says."""
        said = ask(self.engine, micro_batches, self.read)
        if self.writer is not None:
            for first_sample, likeliest in said:
                self.writer.add(first_sample, likeliest, chunk=chunk)


def hands_on(mesh: Mesh, place: Coordinate) -> bool:
    """Whether a rank of a teacher is the one of its data rank that hands on what is said."""
    return place.pipeline == mesh.pipeline - 1 and place.tensor == 0 and place.context == 0


def ask(
    engine: Engine, micro_batches: Sequence[Batch], read: Callable[[Logits], TeacherLogits]
) -> list[tuple[int, Likeliest]]:
    """Ask a teacher; every rank of it calls it alike.

    Returns:
        First sample and likeliest tokens of each micro-batch, on the first tensor rank of the last pipeline ranks.
    """
    found = engine.predict(micro_batches, read)
    if engine.coordinate.tensor:
        return []  # it says the same
    said = []
    for batch, teacher in zip(micro_batches, found, strict=True) if found else ():
        assert teacher.ids_BSK is not None, "the likeliest are asked for"
        parts = (teacher.ids_BSK, teacher.logits.float() - teacher.log_partition_BS.unsqueeze(-1))
        ids_BSK, values_BSK = (rows_of_ranks(part, engine.mesh.context).cpu().numpy() for part in parts)
        said.append((int(batch.sample_ids_B[0]), Likeliest(ids_BSK, values_BSK)))
    return said


def asked_to_stop(given: StageInput) -> bool:
    """Whether somebody touched STOP; only rank 0 looks."""
    asked = torch.tensor(float(given.context.run.stop_file.exists()), device=this_device())
    dist.broadcast(asked, src=0)
    return bool(asked)


def tell(given: StageInput, done: int, num_steps: int) -> None:
    """Say how far a recording is."""
    if given.context.is_first:
        text = f"stage {given.name}: {done} of {num_steps} steps are written down"
        MetricsWriter(given.context.run.metrics_file).write("message", level="info", text=text)
