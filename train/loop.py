"""The training loop of one stage, on every rank: take a step, write it down, validate, save, stop when asked.

The loop knows no backend and no model: it drives an Engine, a Stream and a Saver. Position is one integer, the number
of completed steps; everything else (samples, learning rate) follows from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from conf.schema import ModelConfig, TrainingConfig
from data.batch import Batch, attended_length
from data.held_out import held_out_batches
from data.prefetch import Prefetch
from data.shards import Dataset
from data.stream import stream_of_stage
from parallel import device
from parallel.engine import Engine, Objective, StepResult, TensorSource
from parallel.groups import default_store
from parallel.loss import CrossEntropy
from train.checkpoint import Checkpoint, checkpoint_name
from train.data_gate import DataGate, Reading, data_gate
from train.manifest import Provenance
from train.metrics import MetricsWriter
from train.resume import newest_intact
from train.saver import Saver
from train.schedule import learning_rate
from train.scores import DocumentScores
from train.shared_stream import SharedStream
from train.worker import RankContext, RankOutcome

PREFETCH_STEPS = 4
STOP_POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class StageJob:
    """What a training stage is asked to do.

    Attributes:
        name: of the stage in the recipe.
        kind: of the stage.
        model: its shape.
        training: its settings.
        datasets: every prepared source by name.
        provenance: what its checkpoints say about where they come from.
        objectives: the loss of a step's micro-batches, or one for each; None: cross-entropy.
        teacher_flops_per_token: model FLOPs a token of what `objectives` computes besides.
        reading: what is read besides the steps' batches.
    """

    name: str
    kind: str
    model: ModelConfig
    training: TrainingConfig
    datasets: dict[str, Dataset]
    provenance: Provenance
    objectives: Callable[[Sequence[Batch]], Objective | Sequence[Objective]] | None = None
    teacher_flops_per_token: float = 0.0
    reading: Reading = field(default_factory=Reading)


class TrainingLoop:
    """One stage's optimizer steps on this rank.

    Args:
        context: who this rank is.
        job: what to train on and for how long.
        engine: the model; its weights are loaded by `run`.
        initial: where the weights of step 0 come from.
    """

    def __init__(self, context: RankContext, job: StageJob, engine: Engine, initial: TensorSource) -> None:
        self.context = context
        self.job = job
        self.engine = engine
        self.initial = initial
        training = job.training
        self.stream = stream_of_stage(context.config, job.name, job.datasets)
        self.shared = SharedStream(self.stream, engine.mesh, context.place, default_store(), job.name)
        cross_entropy = CrossEntropy(z_loss=training.z_loss)
        self.objectives = job.objectives or (lambda micro_batches: cross_entropy)
        self.metrics = MetricsWriter(context.run.metrics_file) if context.is_first else None
        self.checkpoints = context.run.checkpoints(job.name)
        self.saver = Saver(
            self.checkpoints,
            rank=context.place.rank,
            world_size=context.place.world_size,
            keep=training.keep_checkpoints,
        )
        self.held_out: dict[str, list[Batch]] = job.reading.of_all_ranks(self.held_out_text)
        self.gate: DataGate | None = data_gate(
            default_store(),
            job.name,
            [job.datasets[name] for name in training.sources],
            place=context.place,
            say=lambda text: self.message("info", text),
        )
        self.stop_checked = 0.0
        self.stop_seen = False
        self.saved_step = -1

    def run(self) -> tuple[RankOutcome, Path]:
        """Train to the last step or to a stop.

        Returns:
            How it ended, and the newest checkpoint, which holds the state it ended in.

        Raises:
            FloatingPointError: the loss is not finite; the newest checkpoint is from before.
            CheckpointError: a checkpoint could not be read or written.
        """
        training = self.job.training
        step = self.restore()
        self.record(
            "stage_started",
            stage_kind=self.job.kind,
            num_parameters=self.engine.num_parameters,
            num_steps=training.num_steps,
            step=step,
            tokens_per_step=training.tokens_per_step,
        )
        stopped = False
        steps = range(step, training.num_steps)
        with Prefetch(self.batches_of, steps, depth=PREFETCH_STEPS, interrupt=self.give_up_waiting) as batches:
            while step < training.num_steps and not stopped:
                if self.gate is not None and not self.gate.opens(step, self.asked_to_stop):
                    stopped = True
                    self.save(step)
                    break
                stopped = self.take_step(step, next(batches))
                step += 1
                last = step == training.num_steps
                if last or is_due(step, training.validate_every_steps):
                    self.validate(step)
                if last or stopped or is_due(step, training.checkpoint_every_steps):
                    self.save(step)
        self.saver.wait()
        self.shared.close()
        return ("stopped" if stopped and step < training.num_steps else "finished"), self.checkpoint_path(step)

    def restore(self) -> int:
        """Continue from this stage's newest intact checkpoint, else load the initial weights.

        Returns:
            Number of completed steps.
        """
        checkpoint = newest_intact(self.checkpoints, self.context.place, self.message)
        if checkpoint is None:
            self.engine.load_weights(self.initial)
            return 0
        checkpoint.require_model(self.job.model)
        self.engine.load_weights(checkpoint.weights)
        self.engine.load_optimizer_state(checkpoint.resume, num_steps=checkpoint.manifest.step)
        self.message("info", f"stage {self.job.name} continues after step {checkpoint.manifest.step}")
        self.saved_step = checkpoint.manifest.step
        return checkpoint.manifest.step

    def batches_of(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step."""
        try:
            return self.shared.batches(step)
        finally:
            # Where they could not be read, too: the step is where that is raised.
            if self.gate is not None:
                self.gate.arrive(step)

    def held_out_text(self) -> dict[str, list[Batch]]:
        """This rank's share of the held-out documents that are scored, by source."""
        training, place = self.job.training, self.engine.coordinate
        return {
            name: held_out_batches(
                dataset,
                tokens=training.validation_tokens,
                sequence_length=training.sequence_length,
                micro_batch=training.micro_batch,
                data_rank=place.data,
                data_size=self.engine.mesh.data,
            )
            for name, dataset in self.job.datasets.items()
            if name in training.sources
        }

    def give_up_waiting(self) -> None:
        """Let the thread that makes batches end, which may wait for an archived shard or for another rank."""
        self.shared.give_up()
        for dataset in self.job.datasets.values():
            dataset.give_up()

    def take_step(self, step: int, micro_batches: list[Batch]) -> bool:
        """One optimizer step and its record; returns whether all ranks agreed to stop after it."""
        training = self.job.training
        rate = learning_rate(training.optim, step, training.num_steps)
        started = time.monotonic()
        objective = self.objectives(micro_batches)
        result = self.engine.step(micro_batches, objective, learning_rate=rate, stop=self.asked_to_stop())
        # Documents of this rank's rows stand for those of all data ranks.
        seconds = time.monotonic() - started
        self.record_step(step + 1, rate, result, seconds=seconds, length=attended_length(micro_batches))
        return result.stop

    def record_step(self, completed: int, rate: float, result: StepResult, *, seconds: float, length: float) -> None:
        """Write a step down; `length` is the mean length that attention saw."""
        training = self.job.training
        tokens_per_second = training.tokens_per_step / seconds
        flops = self.job.model.train_flops_per_token(length) + self.job.teacher_flops_per_token
        flops_per_rank = flops * tokens_per_second / self.engine.mesh.world_size
        peak = device.peak_flops()
        self.record(
            "step",
            step=completed,
            num_steps=training.num_steps,
            loss=result.loss,
            learning_rate=rate,
            grad_norm=result.grad_norm,
            tokens=completed * training.tokens_per_step,
            step_seconds=seconds,
            tokens_per_second=tokens_per_second,
            model_tflops=flops_per_rank / 1e12,
            mfu=None if peak is None else flops_per_rank / peak,
            memory_bytes=self.engine.peak_memory_bytes(),
            metrics=result.metrics,
        )

    def validate(self, step: int) -> None:
        """Score the held-out documents of every source in the mixture, and write down what was read so far."""
        storage, tiers = self.stream.counters()
        self.record("reading", step=step, storage=storage, tiers=tiers)
        for source, batches in self.held_out.items():
            scores = score_documents(self.engine, batches)
            loss = scores.loss()
            self.record(
                "validation",
                step=step,
                source=source,
                loss=loss.mean,
                standard_error=loss.standard_error,
                accuracy=scores.accuracy().mean,
                num_tokens=scores.num_tokens,
            )

    def save(self, step: int) -> None:
        """Copy the state to host memory and let it be written in the background, unless it is saved already."""
        if step == self.saved_step:
            return
        self.saved_step = step
        started = time.monotonic()
        pending = self.saver.save(
            step,
            weights=self.engine.weights(),
            resume=self.engine.optimizer_state(),
            provenance=self.job.provenance,
            samples=step * self.job.training.global_batch,
            tokens=step * self.job.training.tokens_per_step,
        )
        blocked = time.monotonic() - started
        if self.metrics is not None:
            pending.add_done_callback(lambda done: self.record_checkpoint(step, blocked, time.monotonic() - started))

    def record_checkpoint(self, step: int, blocked: float, seconds: float) -> None:
        """Write a durable checkpoint down."""
        path = self.checkpoint_path(step)
        checkpoint = Checkpoint.open(path)
        self.record(
            "checkpoint",
            step=step,
            path=str(path),
            num_bytes=checkpoint.num_bytes,
            seconds_blocked=blocked,
            seconds=seconds,
        )

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.checkpoints / checkpoint_name(step)

    def asked_to_stop(self) -> bool:
        """Whether somebody touched STOP; only rank 0 looks, a few times a second, and the step tells the others."""
        now = time.monotonic()
        if self.context.is_first and not self.stop_seen and now - self.stop_checked > STOP_POLL_SECONDS:
            self.stop_checked = now
            self.stop_seen = self.context.run.stop_file.exists()
        return self.stop_seen

    def record(self, kind: str, **fields: object) -> None:
        """Write a record of this stage, on rank 0."""
        if self.metrics is not None:
            self.metrics.write(kind, stage=self.job.name, **fields)

    def message(self, level: str, text: str) -> None:
        """Tell the user something, on rank 0."""
        if self.metrics is not None:
            self.metrics.write("message", level=level, text=text)


def score_documents(engine: Engine, batches: list[Batch]) -> DocumentScores:
    """Scores of held-out batches by document, the same on every rank."""
    rows = engine.score(batches)
    return DocumentScores.from_rows(
        rows.sample_ids_B.numpy(), rows.loss_B.numpy(), rows.correct_B.numpy(), rows.num_tokens_B.numpy()
    )


def is_due(step: int, every: int) -> bool:
    """Whether something done every `every` steps is done after this one; 0 is never."""
    return every > 0 and step % every == 0
