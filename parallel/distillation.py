"""Learning from another model's logits: the objective of a micro-batch, and the teacher in the student's processes.

Shape suffixes: B rows, S tokens, V this tensor rank's part of the vocabulary, K the teacher's k likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import Batch
from data.logits import LogitsReader
from parallel.divergence import TeacherLogits, divergence_of, largest_logits, scaled_logits
from parallel.engine import Engine, Logits, LossSums, Tokenwise
from parallel.inputs import placed
from parallel.loss import parts_of_tokens, score_tokens
from parallel.mesh import Coordinate, Mesh


class TokenTeacher(Protocol):
    """What a teacher says of the tokens of one micro-batch."""

    def at(self, tokens: slice) -> TeacherLogits:
        """What it says of some tokens of every row."""
        ...


@dataclass(frozen=True, slots=True)
class WholeTeacher:
    """All of a teacher's logits, multiplied out a slice of the tokens at a time.

    What is kept of a micro-batch are the hidden states that go into its head: at 70B shapes half of its logits.
    """

    logits: Logits
    temperature: float

    def at(self, tokens: slice) -> TeacherLogits:
        """See `TokenTeacher`."""
        return scaled_logits(self.logits.at(tokens), self.temperature, self.logits.group)


@dataclass(frozen=True, kw_only=True, slots=True)
class Distillation(Tokenwise):
    """`weight` x KL divergence from the teacher + (1 - weight) x cross-entropy of the labels.

    Implements `Objective` for one micro-batch: the one `teacher` is about. The divergence is multiplied by the squared
    temperature, so that gradients keep their size (Hinton et al. 2015). Reports `accuracy`, `cross_entropy` and
    `divergence`.

    Attributes:
        teacher: None on ranks that see no logits.
        divergence: forward is KL(teacher || student), reverse KL(student || teacher).
        weight: of the divergence, 0 to 1.
        temperature: divides both models' logits.
        tokens: those it is called with the logits of; None: all.
    """

    teacher: TokenTeacher | None = None
    divergence: Literal["forward", "reverse"] = "forward"
    weight: float = 1.0
    temperature: float = 1.0
    tokens: slice | None = None

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics, in order."""
        return "accuracy", "cross_entropy", "divergence"

    def at(self, tokens: slice) -> Distillation:
        """See `Tokenwise.at`."""
        return replace(self, tokens=tokens)

    def __call__(
        self, logits_BSV: Tensor, labels_BS: Tensor, loss_mask_BS: Tensor, tensor_group: dist.ProcessGroup
    ) -> LossSums:
        """Sums over this rank's counted tokens."""
        assert self.teacher is not None, "the last pipeline rank has what the teacher says"
        teacher = self.teacher.at(slice(None) if self.tokens is None else self.tokens)
        divergence_BS = divergence_of(
            logits_BSV, teacher, tensor_group, direction=self.divergence, temperature=self.temperature
        )
        del teacher
        tokens = score_tokens(logits_BSV, labels_BS, tensor_group)
        divergence = (divergence_BS * loss_mask_BS).sum()
        cross_entropy = (tokens.loss_BS * loss_mask_BS).sum()
        metrics = {
            "accuracy": (tokens.correct_BS * loss_mask_BS).sum(),
            "cross_entropy": cross_entropy.detach(),
            "divergence": divergence.detach(),
        }
        loss = self.weight * self.temperature**2 * divergence
        if self.weight < 1.0:
            loss = loss + (1.0 - self.weight) * cross_entropy
        return LossSums(loss=loss, num_tokens=loss_mask_BS.sum(), metrics=metrics)


@dataclass(frozen=True, slots=True)
class FromTeacher:
    """Objectives of a step: asks the teacher about its micro-batches first. Every rank calls it alike.

    Attributes:
        engine: the teacher, on the student's mesh.
        objective: what to do with its logits.
        top_k: keep so many of its logits a token; 0: all.
    """

    engine: Engine
    objective: Distillation
    top_k: int

    def __call__(self, micro_batches: Sequence[Batch]) -> list[Distillation]:
        """One objective a micro-batch."""
        found = self.engine.predict(micro_batches, read_teacher(self.objective.temperature, self.top_k))
        if not found:
            return [self.objective] * len(micro_batches)
        return [replace(self.objective, teacher=teacher) for teacher in found]


@dataclass(frozen=True, slots=True)
class FromReader:
    """Objectives of a step from what a teacher said elsewhere; the samples of the step after it are read ahead.

    Attributes:
        said: a recording, or what a teacher on other ranks says.
        objective: what to do with it.
        mesh: of the student.
        device: of this rank.
        samples_per_step: over all data ranks.
    """

    said: LogitsReader
    objective: Distillation
    mesh: Mesh
    device: torch.device
    samples_per_step: int

    def __call__(self, micro_batches: Sequence[Batch]) -> list[Distillation]:
        """One objective a micro-batch."""
        place = self.mesh.coordinate(dist.get_rank())
        if place.pipeline < self.mesh.pipeline - 1:
            return [self.objective] * len(micro_batches)
        ids = [number for batch in micro_batches for number in batch.sample_ids_B.tolist()]
        self.said.expect([*ids, *(number + self.samples_per_step for number in ids)])
        return [replace(self.objective, teacher=self._said_of(batch, place)) for batch in micro_batches]

    def _said_of(self, batch: Batch, place: Coordinate) -> TeacherLogits:
        ids_BSK, values_BSK = (
            placed(each, self.mesh, place, self.device) for each in self.said.read(batch.sample_ids_B)
        )
        # Logarithms of probabilities: their partition is 1.
        return TeacherLogits(values_BSK, ids_BSK, values_BSK.new_zeros(values_BSK.shape[:2]))


def read_teacher(temperature: float, top_k: int) -> Callable[[Logits], TokenTeacher]:
    """What to keep of a teacher's logits; for `Engine.predict`."""
    if top_k:
        return read_likeliest(temperature, top_k)
    return lambda logits: WholeTeacher(logits, temperature)


def read_likeliest(temperature: float, top_k: int) -> Callable[[Logits], TeacherLogits]:
    """To keep the k likeliest tokens; for `Engine.predict`."""

    def read(logits: Logits) -> TeacherLogits:
        parts = [_likeliest(scaled, top_k, logits.group) for scaled in _in_slices(logits, temperature)]
        return TeacherLogits(*(torch.cat(each, dim=1) for each in zip(*parts, strict=True)))

    return read


def _in_slices(logits: Logits, temperature: float) -> Iterator[TeacherLogits]:
    num_rows, num_tokens, _ = logits.hidden_BSD.shape
    for part in parts_of_tokens(num_rows, num_tokens, logits.weight_VD.size(0)):
        yield scaled_logits(logits.at(part), temperature, logits.group)


def _likeliest(every: TeacherLogits, count: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    logits_BSK, ids_BSK = largest_logits(every.logits, count, group)
    return logits_BSK, ids_BSK, every.log_partition_BS
