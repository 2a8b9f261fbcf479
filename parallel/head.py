"""The output head and the loss together, a slice of the tokens at a time, so that no tensor of all logits ever exists.

Megatron's GPTModel multiplies by the head's weight and returns logits. `keep_hidden` makes it return what goes into
that product, and the functions here multiply, ask the objective and go back to the hidden states, slice by slice.

Shape suffixes: B rows, S tokens, D hidden, V this tensor rank's part of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from torch import Tensor

from parallel.engine import LossSums, Objective, Tokenwise
from parallel.inputs import Inputs
from parallel.linear import accumulate_product, matrix_product
from parallel.loss import parts_of_tokens, score_tokens


def keep_hidden(chunk: Any) -> None:
    """Let a GPTModel with a head return the hidden states of all tokens, shape (B, S, D), instead of logits.

    The head stays a module that is called, because Megatron's hooks gather its weight then.
    """
    head = chunk.output_layer

    def whole_sequence(hidden_SBD: Tensor, weight: Tensor | None = None, **_: object) -> tuple[Tensor, None]:
        if head.sequence_parallel:
            return mappings.gather_from_sequence_parallel_region(hidden_SBD, group=head.tp_group), None
        # Rows first, and back for GPTModel to do it again: Megatron sums a gradient that is not contiguous in a copy,
        # and goes on with this rank's part.
        hidden_BSD = hidden_SBD.transpose(0, 1).contiguous()
        return mappings.copy_to_tensor_model_parallel_region(hidden_BSD, group=head.tp_group).transpose(0, 1), None

    head.forward = whole_sequence


def loss_of_hidden(
    objective: Objective, hidden_BSD: Tensor, weight_VD: Tensor, inputs: Inputs, group: dist.ProcessGroup
) -> LossSums:
    """What the objective makes of the logits; a tokenwise one is asked about a slice of the tokens at a time.

    Going back through the loss expects an outgoing gradient of one, which Megatron gives sums. The weight's gradient is
    added to its `main_grad` on the way forward, when the logits are there.
    """
    names = objective.metric_names
    loss, num_tokens, *metrics = _Head.apply(hidden_BSD, weight_VD, objective, inputs, group)  # type: ignore[no-untyped-call]
    return LossSums(loss=loss, num_tokens=num_tokens, metrics=dict(zip(names, metrics, strict=True)))


@torch.no_grad()
def score_rows(hidden_BSD: Tensor, weight_VD: Tensor | None, inputs: Inputs, group: dist.ProcessGroup) -> Tensor:
    """Sums over counted tokens of loss, of correct predictions and of ones, float64, shape (B, 3).

    Without a weight `hidden_BSD` is the logits.
    """
    rows_B3 = hidden_BSD.new_zeros(hidden_BSD.size(0), 3, dtype=torch.float64)
    vocabulary = hidden_BSD.size(2) if weight_VD is None else weight_VD.size(0)
    for part in parts_of_tokens(hidden_BSD.size(0), hidden_BSD.size(1), vocabulary):
        logits_BSV = hidden_BSD[:, part] if weight_VD is None else hidden_BSD[:, part] @ weight_VD.t()
        tokens = score_tokens(logits_BSV, inputs.labels_BS[:, part], group)
        mask_BS = inputs.loss_mask_BS[:, part].double()
        columns = (tokens.loss_BS, tokens.correct_BS, torch.ones_like(mask_BS))
        rows_B3 += torch.stack([(values * mask_BS).sum(dim=1) for values in columns], dim=1)
    return rows_B3


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_BSD: Tensor, weight_VD: Tensor, objective: Objective, inputs: Inputs, group: dist.ProcessGroup
    ) -> tuple[Tensor, ...]:
        num_rows, num_tokens, _ = hidden_BSD.shape
        is_tokenwise = isinstance(objective, Tokenwise)
        parts = parts_of_tokens(num_rows, num_tokens, weight_VD.size(0)) if is_tokenwise else [slice(None)]
        gradient_BSD = torch.empty_like(hidden_BSD)
        totals: Tensor | None = None
        for part in parts:
            hidden, labels, mask = hidden_BSD[:, part], inputs.labels_BS[:, part], inputs.loss_mask_BS[:, part]
            asked = objective.at(part) if isinstance(objective, Tokenwise) else objective
            with torch.enable_grad():
                logits = matrix_product(hidden.detach(), weight_VD.detach(), transposed=True).requires_grad_()
                sums = asked(logits, labels, mask, group)
                (logits_gradient,) = torch.autograd.grad(sums.loss, logits)
            metrics = [sums.metrics[name] for name in objective.metric_names]
            values = torch.stack([each.detach().float() for each in (sums.loss, sums.num_tokens, *metrics)])
            totals = values if totals is None else totals + values
            gradient_BSD[:, part] = matrix_product(logits_gradient, weight_VD, transposed=False)
            accumulate_product(hidden.flatten(0, 1), logits_gradient.flatten(0, 1), weight_VD.main_grad)  # type: ignore[attr-defined]
        assert totals is not None
        ctx.save_for_backward(gradient_BSD)
        ctx.weight_VD = weight_VD  # not saved: hooks of saved tensors give back one without Megatron's marks
        # Copies: Megatron refuses to free a loss that is a view of another tensor.
        loss, *others = (each.clone() for each in totals.unbind())
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        (gradient_BSD,) = ctx.saved_tensors
        weight_VD = ctx.weight_VD
        # Where the weight is the embedding's too, that gives a gradient, which must be added to what is there.
        is_tied = not weight_VD.grad_added_to_main_grad
        return gradient_BSD, None if is_tied else torch.empty_like(weight_VD), None, None, None
