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

    With the k largest logits only, what the teacher gives to other tokens is left out of the sum, not spread over them.

    Raises:
        ValueError: the models' vocabularies differ, or reverse divergence is asked of k logits.
    """
    if teacher.ids_BSK is None and teacher.logits.shape != student_BSV.shape:
        raise ValueError(
            f"teacher and student have logits of shapes {tuple(teacher.logits.shape)} and {tuple(student_BSV.shape)}; "
            "distillation needs one vocabulary"
        )
    if teacher.ids_BSK is not None and direction == "reverse":
        raise ValueError("reverse divergence needs all of the teacher's logits: set top_k=0")
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
            divergence_BS, gradient_BSV = _over_largest(log_student_BSV, log_teacher, teacher.ids_BSK, group)
        elif direction == "forward":
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


def _over_largest(
    log_student_BSV: Tensor, log_teacher_BSK: Tensor, ids_BSK: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Forward divergence over the teacher's k largest, and its gradient in the student's scaled logits."""
    size = log_student_BSV.size(-1)
    here_BSK = ids_BSK - size * (0 if group is None else group.rank())
    elsewhere_BSK = (here_BSK < 0) | (here_BSK >= size)
    here_BSK = here_BSK.masked_fill(elsewhere_BSK, 0)
    probability_BSK = log_teacher_BSK.exp()
    terms_BSK = probability_BSK * (log_teacher_BSK - log_student_BSV.gather(-1, here_BSK))
    divergence_BS = terms_BSK.masked_fill(elsewhere_BSK, 0.0).sum(dim=-1)
    _reduce(divergence_BS, dist.ReduceOp.SUM, group)
    gradient_BSV = log_student_BSV.exp_().mul_(probability_BSK.sum(dim=-1, keepdim=True))
    gradient_BSV.scatter_add_(-1, here_BSK, -probability_BSK.masked_fill(elsewhere_BSK, 0.0))
    return divergence_BS, gradient_BSV


def _log_partition(logits_BSV: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    largest_BS = logits_BSV.amax(dim=-1).float()
    _reduce(largest_BS, dist.ReduceOp.MAX, group)
    sums_BS = (logits_BSV.float() - largest_BS.unsqueeze(-1)).exp_().sum(dim=-1)
    _reduce(sums_BS, dist.ReduceOp.SUM, group)
    return sums_BS.log_() + largest_BS


def _reduce(tensor: Tensor, operation: Any, group: dist.ProcessGroup | None) -> None:
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, op=operation, group=group)
