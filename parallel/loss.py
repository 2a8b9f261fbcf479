"""Losses on logits whose vocabulary is spread over tensor ranks; the logits are never gathered.

Shape suffixes: B rows, S tokens, V this tensor rank's part of the vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.engine import LossSums, Tokenwise

P = ParamSpec("P")
T = TypeVar("T")

# Of float32 logits that live at once. Large enough that a slice keeps a GPU busy, small beside a layer's activations.
LOGIT_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class CrossEntropy(Tokenwise):
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
    """Keeps the logits as they came and one number a token; float32 copies live for a part of the tokens at a time."""

    @staticmethod
    def forward(
        ctx: Any, logits_BSV: Tensor, labels_BS: Tensor, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        size = logits_BSV.size(-1)
        here_BS = labels_BS - size * (0 if group is None else group.rank())
        elsewhere_BS = (here_BS < 0) | (here_BS >= size)
        here_BS = here_BS.masked_fill(elsewhere_BS, 0)
        sums = kernel(_sums_of_slice, logits_BSV)
        parts = parts_of_tokens(logits_BSV.size(0), logits_BSV.size(1), size)
        pieces = [sums(logits_BSV[:, part], here_BS[:, part]) for part in parts]
        largest_BS, partition_BS, label_BS = (torch.cat(piece, dim=1) for piece in zip(*pieces, strict=True))
        if group is not None and group.size() > 1:
            largest_here_BS = largest_BS.clone()
            dist.all_reduce(largest_BS, op=dist.ReduceOp.MAX, group=group)
            partition_BS *= (largest_here_BS - largest_BS).exp()
            label_BS = (label_BS + largest_here_BS - largest_BS).masked_fill_(elsewhere_BS, 0.0)
            sums_2BS = torch.stack((partition_BS, label_BS))
            dist.all_reduce(sums_2BS, group=group)
            partition_BS, label_BS = sums_2BS

        loss_BS = partition_BS.log() - label_BS
        log_partition_BS = partition_BS.log() + largest_BS
        correct_BS = label_BS >= 0
        ctx.save_for_backward(logits_BSV, largest_BS, partition_BS, here_BS, elsewhere_BS)
        ctx.mark_non_differentiable(correct_BS)
        return loss_BS, log_partition_BS, correct_BS

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        loss_gradient_BS, log_partition_gradient_BS, _ = gradients
        logits_BSV, largest_BS, partition_BS, here_BS, elsewhere_BS = ctx.saved_tensors
        scale_BS = (loss_gradient_BS + log_partition_gradient_BS) / partition_BS
        at_label_BS = loss_gradient_BS.masked_fill(elsewhere_BS, 0.0)
        gradient_BSV = torch.empty_like(logits_BSV)
        write_gradient = kernel(_write_gradient_of_slice, logits_BSV)
        for part in parts_of_tokens(*logits_BSV.shape):
            per_token = (each[:, part] for each in (largest_BS, scale_BS, at_label_BS, here_BS))
            write_gradient(gradient_BSV[:, part], logits_BSV[:, part], *per_token)
        return gradient_BSV, None, None


def _sums_of_slice(logits_BSV: Tensor, label_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logit, sum of the exponentials of logits less it, and the label's logit less it, in float32."""
    largest_BS = logits_BSV.amax(dim=-1).float()
    shifted_BSV = logits_BSV.float() - largest_BS.unsqueeze(-1)
    at_label_BS = shifted_BSV.gather(-1, label_BS.unsqueeze(-1)).squeeze(-1)
    # In place: memory that was not touched before costs a CPU more than the exponentials do.
    return largest_BS, shifted_BSV.exp_().sum(dim=-1), at_label_BS


def _write_gradient_of_slice(
    gradient_BSV: Tensor,
    logits_BSV: Tensor,
    largest_BS: Tensor,
    scale_BS: Tensor,
    at_label_BS: Tensor,
    label_BS: Tensor,
) -> None:
    is_exact = gradient_BSV.dtype == torch.float32
    values_BSV = gradient_BSV if is_exact else torch.empty_like(gradient_BSV, dtype=torch.float32)
    torch.sub(logits_BSV, largest_BS.unsqueeze(-1), out=values_BSV)
    values_BSV.exp_().mul_(scale_BS.unsqueeze(-1))
    values_BSV.scatter_add_(-1, label_BS.unsqueeze(-1), -at_label_BS.unsqueeze(-1))
    if not is_exact:
        gradient_BSV.copy_(values_BSV)


def parts_of_tokens(num_rows: int, num_tokens: int, vocabulary: int) -> list[slice]:
    """Slices of the tokens of a row, such that the float32 logits of one slice of all rows stay below LOGIT_BYTES.

    >>> parts_of_tokens(1, 8192, 32_000)[:2]
    [slice(0, 2097, None), slice(2097, 4194, None)]
    """
    step = max(1, LOGIT_BYTES // (4 * num_rows * vocabulary))
    return [slice(start, min(start + step, num_tokens)) for start in range(0, num_tokens, step)]


def kernel(function: Callable[P, T], tensor: Tensor) -> Callable[P, T]:
    """The function, as one kernel where the tensor is on a GPU; on a CPU compiling takes longer than it saves."""
    return _compiled(function) if tensor.is_cuda else function


@functools.cache
def _compiled(function: Callable[P, T]) -> Callable[P, T]:
    return torch.compile(function, dynamic=True)
