"""How far a student's predictions are from its teacher's, with the vocabulary of both spread over tensor ranks.

Nothing is gathered. Shape suffixes: B rows, S tokens, V this tensor rank's part of the vocabulary, K the teacher's k
likeliest tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor

# Of what k tokens leave to others: below it, the teacher's, one less a sum of float32, is all rounding.
SMALLEST_REST = 1e-6


@dataclass(frozen=True, slots=True)
class TeacherLogits:
    """What a teacher says of some tokens, divided by the temperature.

    Attributes:
        logits: this tensor rank's slice of the vocabulary (BSV), or, with `ids_BSK`, the k largest of all of it (BSK,
            the same on every tensor rank).
        ids_BSK: tokens of those logits; None where all are kept.
        log_partition_BS: logarithm of the sum of the exponentials of *all* logits, float32.
    """

    logits: Tensor
    ids_BSK: Tensor | None
    log_partition_BS: Tensor

    def at(self, tokens: slice) -> TeacherLogits:
        """What it says of some of them."""
        ids = None if self.ids_BSK is None else self.ids_BSK[:, tokens]
        return TeacherLogits(self.logits[:, tokens], ids, self.log_partition_BS[:, tokens])


def scaled_logits(logits_BSV: Tensor, temperature: float, group: dist.ProcessGroup | None) -> TeacherLogits:
    """All of a teacher's logits of some tokens."""
    scaled_BSV = logits_BSV / temperature if temperature != 1.0 else logits_BSV
    return TeacherLogits(scaled_BSV, None, _log_partition(scaled_BSV, group))


def largest_logits(logits_BSV: Tensor, count: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The `count` largest logits of the whole vocabulary and their token ids, the same on every tensor rank."""
    size = logits_BSV.size(-1)
    values, ids = logits_BSV.topk(min(count, size), dim=-1)
    if group is not None and group.size() > 1:
        ids = ids + size * group.rank()
        every = [torch.empty_like(values) for _ in range(group.size())]
        every_id = [torch.empty_like(ids) for _ in range(group.size())]
        dist.all_gather(every, values.contiguous(), group=group)
        dist.all_gather(every_id, ids.contiguous(), group=group)
        values, places = torch.cat(every, dim=-1).topk(count, dim=-1)
        ids = torch.cat(every_id, dim=-1).gather(-1, places)
    return values, ids


def divergence_of(
    student_BSV: Tensor,
    teacher: TeacherLogits,
    group: dist.ProcessGroup | None,
    *,
    direction: Literal["forward", "reverse"],
    temperature: float,
) -> Tensor:
    """KL divergence of each token at that temperature, in nats, float32, shape BS; differentiable in `student_BSV`.

    With the k largest logits only, all other tokens are one outcome: the divergence is that between k + 1 outcomes,
    the least that any teacher with these k can have. It is zero where the student gives each of the k what the teacher
    gives it, however it shares out the rest.

    Raises:
        ValueError: the models' vocabularies differ.
    """
    if teacher.ids_BSK is None and teacher.logits.shape != student_BSV.shape:
        raise ValueError(
            f"teacher and student have logits of shapes {tuple(teacher.logits.shape)} and {tuple(student_BSV.shape)}; "
            "distillation needs one vocabulary"
        )
    return cast(Tensor, _Divergence.apply(student_BSV, teacher, group, direction, temperature))  # type: ignore[no-untyped-call]


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_BSV: Tensor,
        teacher: TeacherLogits,
        group: dist.ProcessGroup | None,
        direction: str,
        temperature: float,
    ) -> Tensor:
        # In place wherever a tensor is not needed again: a slice of the tokens is as large as what lives of it at once.
        log_student_BSV = student_BSV.float() / temperature
        log_student_BSV -= _log_partition(log_student_BSV, group).unsqueeze(-1)
        log_teacher = teacher.logits.float() - teacher.log_partition_BS.unsqueeze(-1)
        if teacher.ids_BSK is not None:
            log_teacher = _completed(log_teacher, teacher.ids_BSK, log_student_BSV, group)
        if direction == "forward":
            probability_BSV = log_teacher.exp()
            divergence_BS = log_teacher.sub_(log_student_BSV).mul_(probability_BSV).sum(dim=-1)
            _reduce(divergence_BS, dist.ReduceOp.SUM, group)
            gradient_BSV = log_student_BSV.exp_().sub_(probability_BSV)
        else:
            probability_BSV = log_student_BSV.exp()
            difference_BSV = log_student_BSV.sub_(log_teacher)
            divergence_BS = (probability_BSV * difference_BSV).sum(dim=-1)
            _reduce(divergence_BS, dist.ReduceOp.SUM, group)
            gradient_BSV = probability_BSV.mul_(difference_BSV.sub_(divergence_BS.unsqueeze(-1)))
        ctx.save_for_backward(gradient_BSV)
        ctx.temperature, ctx.dtype = temperature, student_BSV.dtype
        return divergence_BS

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient_BSV,) = ctx.saved_tensors
        gradient_BSV = gradient_BSV.mul_(gradients[0].unsqueeze(-1) / ctx.temperature)
        return gradient_BSV.to(ctx.dtype), None, None, None, None


def _completed(
    log_teacher_BSK: Tensor, ids_BSK: Tensor, log_student_BSV: Tensor, group: dist.ProcessGroup | None
) -> Tensor:
    """Log-probabilities of this rank's tokens: the k that are known, and of others the student's, scaled to the rest.

    Tokens that are not among the k so have one ratio to the student's, and divergence and gradient over the vocabulary
    are those of k + 1 outcomes.
    """
    size = log_student_BSV.size(-1)
    here_BSK = ids_BSK - size * (0 if group is None else group.rank())
    elsewhere_BSK = (here_BSK < 0) | (here_BSK >= size)
    here_BSK = here_BSK.masked_fill(elsewhere_BSK, 0)
    log_student_BSK = log_student_BSV.gather(-1, here_BSK)
    known_BSK = log_student_BSK.exp().masked_fill_(elsewhere_BSK, 0.0)
    # Summed up, since one less the sum of the k is mostly rounding where they are nearly all.
    rest_BS = log_student_BSV.exp().scatter_add_(-1, here_BSK, -known_BSK).sum(dim=-1)
    _reduce(rest_BS, dist.ReduceOp.SUM, group)
    rest_of_teacher_BS = 1.0 - log_teacher_BSK.exp().sum(dim=-1)
    scale_BS1 = (_log_rest(rest_of_teacher_BS) - _log_rest(rest_BS)).unsqueeze(-1)
    correction_BSK = (log_teacher_BSK - log_student_BSK - scale_BS1).masked_fill_(elsewhere_BSK, 0.0)
    return (log_student_BSV + scale_BS1).scatter_add_(-1, here_BSK, correction_BSK)


def _log_rest(rest: Tensor) -> Tensor:
    return rest.clamp(min=SMALLEST_REST).log_()


def _log_partition(logits_BSV: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    largest_BS = logits_BSV.amax(dim=-1).float()
    _reduce(largest_BS, dist.ReduceOp.MAX, group)
    sums_BS = (logits_BSV.float() - largest_BS.unsqueeze(-1)).exp_().sum(dim=-1)
    _reduce(sums_BS, dist.ReduceOp.SUM, group)
    return sums_BS.log_() + largest_BS


def _reduce(tensor: Tensor, operation: Any, group: dist.ProcessGroup | None) -> None:
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, op=operation, group=group)
