"""Losses on logits whose vocabulary is spread over tensor ranks; the logits are never gathered.

Shape suffixes: B rows, S tokens, V this tensor rank's part of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.engine import LossSums


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """Cross-entropy of the labels, plus `z_loss` times the squared log-partition, which keeps logits from drifting.

    Implements `Objective`. Reports `accuracy`, and `z_loss` (the term itself, in nats) where it is used.
    """

    z_loss: float = 0.0

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics, in order."""
        return ("accuracy", "z_loss") if self.z_loss else ("accuracy",)

    def __call__(
        self, logits_BSV: Tensor, labels_BS: Tensor, loss_mask_BS: Tensor, tensor_group: dist.ProcessGroup
    ) -> LossSums:
        """Sums over this rank's counted tokens."""
        tokens = score_tokens(logits_BSV, labels_BS, tensor_group)
        loss = (tokens.loss_BS * loss_mask_BS).sum()
        metrics = {"accuracy": (tokens.correct_BS * loss_mask_BS).sum()}
        if self.z_loss:
            term = self.z_loss * (tokens.log_partition_BS.square() * loss_mask_BS).sum()
            metrics["z_loss"] = term.detach()
            loss = loss + term
        return LossSums(loss=loss, num_tokens=loss_mask_BS.sum(), metrics=metrics)


class TokenScores(NamedTuple):
    """How well each token is predicted.

    Attributes:
        loss_BS: negative log-likelihood of the label in nats, float32, differentiable.
        log_partition_BS: logarithm of the sum of exponentiated logits, float32, differentiable.
        correct_BS: no logit is larger than the label's.
    """

    loss_BS: Tensor
    log_partition_BS: Tensor
    correct_BS: Tensor


def score_tokens(logits_BSV: Tensor, labels_BS: Tensor, tensor_group: dist.ProcessGroup | None) -> TokenScores:
    """Score labels under logits whose vocabulary is spread over `tensor_group` (None: not spread), in float32."""
    return TokenScores(*_VocabularyParallelScores.apply(logits_BSV, labels_BS, tensor_group))  # type: ignore[no-untyped-call]


class _VocabularyParallelScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_BSV: Tensor, labels_BS: Tensor, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        largest_BS = logits_BSV.amax(dim=-1).float()
        _reduce(largest_BS, dist.ReduceOp.MAX, group)
        shifted_BSV = logits_BSV.float() - largest_BS.unsqueeze(-1)

        size = logits_BSV.size(-1)
        here_BS = labels_BS - size * (0 if group is None else group.rank())
        elsewhere_BS = (here_BS < 0) | (here_BS >= size)
        here_BS = here_BS.masked_fill(elsewhere_BS, 0)
        label_BS = shifted_BSV.gather(-1, here_BS.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere_BS, 0.0)

        exponential_BSV = shifted_BSV.exp_()
        sums_2BS = torch.stack((exponential_BSV.sum(dim=-1), label_BS))
        _reduce(sums_2BS, dist.ReduceOp.SUM, group)
        partition_BS, label_BS = sums_2BS
        probability_BSV = exponential_BSV.div_(partition_BS.unsqueeze(-1))

        ctx.save_for_backward(probability_BSV, here_BS, elsewhere_BS)
        ctx.dtype = logits_BSV.dtype
        correct_BS = label_BS >= 0
        ctx.mark_non_differentiable(correct_BS)
        log_partition_BS = partition_BS.log()
        return log_partition_BS - label_BS, log_partition_BS + largest_BS, correct_BS

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        loss_gradient_BS, log_partition_gradient_BS, _ = gradients
        probability_BSV, here_BS, elsewhere_BS = ctx.saved_tensors
        # In place: probabilities are the largest tensor of a step, and a graph is walked back once.
        gradient_BSV = probability_BSV.mul_((loss_gradient_BS + log_partition_gradient_BS).unsqueeze(-1))
        at_label_BS = loss_gradient_BS.masked_fill(elsewhere_BS, 0.0)
        gradient_BSV.scatter_add_(-1, here_BS.unsqueeze(-1), -at_label_BS.unsqueeze(-1))
        return gradient_BSV.to(ctx.dtype), None, None


def _reduce(tensor: Tensor, operation: Any, group: dist.ProcessGroup | None) -> None:
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, op=operation, group=group)
