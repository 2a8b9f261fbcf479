"""Mixture of experts for Megatron's MoE layer: a router and grouped experts, exact under every layout.

Megatron's own need TransformerEngine, or run one expert after the other; its router losses are weighed by, and tokens
dropped among, the tokens of a rank, so that both change with the tensor and context axes. Here they are of the whole
micro-batch.
Tokens travel by Megatron's all-to-all dispatcher.

Shape suffixes: S tokens of a row on this rank, B rows, T all tokens of this rank (S x B), D hidden, E experts,
K experts a token, L experts of this rank, N tokens sent to those, F this tensor rank's part of an expert's width.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.nn.functional import linear

from conf.schema import ExpertsConfig
from parallel.attention import all_gather
from parallel.device import this_device

METRICS = ("router_balance", "router_z", "router_dropped")
ALIGNMENT_BYTES = 16


class RouterTotals:
    """What all routers of an engine add up in a step, and how much their losses count in it.

    Attributes:
        sums: float32 sums over layers and micro-batches of what `METRICS` names, this rank's share of them. Balance is
            experts x sum over experts of (share of the tokens sent there) x (mean probability), 1 when even; z the mean
            squared log-partition; dropped the share of what was sent that no expert took.
        weight: float32, what one micro-batch's loss is multiplied by before the engine divides gradients by the
            counted tokens of the global batch: those over the number of micro-batches, so that losses are means over
            micro-batches whatever is masked.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(METRICS), device=device)
        self.weight = torch.zeros((), device=device)

    def in_tokens(self) -> Tensor:
        """The sums as if each counted token had the mean: what the engine divides by counted tokens to report."""
        return self.sums * self.weight

    def begin_step(self, weight: Tensor) -> None:
        """Forget the sums; `weight` is that of the coming step, shape ()."""
        self.sums.zero_()
        self.weight.copy_(weight)


def moe_layer(experts: ExpertsConfig) -> ModuleSpec:
    """What takes the place of the feed-forward network in Megatron's layer spec."""
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            experts=ModuleSpec(module=GroupedExperts),
            router=lambda config, pg_collection: Router(experts, config, pg_collection),
        ),
    )


def routers_of(chunk: torch.nn.Module) -> list[Router]:
    """The routers of a model chunk."""
    return [module for module in chunk.modules() if isinstance(module, Router)]


class Router(torch.nn.Module):
    """Sends each token to the experts it scores highest, weighed by the softmax over their scores, in float32.

    Hugging Face's Mixtral takes the softmax over all experts and normalises what is left: the same numbers.
    """

    totals: RouterTotals
    """Set by the engine."""

    def __init__(self, experts: ExpertsConfig, config: Any, groups: Any) -> None:
        super().__init__()
        self.experts = experts
        # Tensor ranks (which split the sequence) and context ranks hold parts of one micro-batch.
        self.group: dist.ProcessGroup = groups.tp_cp
        shape = (experts.num_experts, config.hidden_size)
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=this_device()))
        # Each tensor rank sees only its part of the sequence: Megatron sums the gradients of parameters marked so.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def set_layer_number(self, layer_number: int) -> None:
        """Called by Megatron; every layer's router is alike."""

    def forward(self, hidden_SBD: Tensor, padding_mask: None = None) -> tuple[Tensor, Tensor]:
        """Weights of each token's experts, float32 (T, E), 0 elsewhere, and which experts those are, bool (T, E)."""
        assert padding_mask is None, "every token is routed"
        logits_TE = cast(Tensor, _Float32Linear.apply(hidden_SBD.flatten(0, 1), self.weight))  # type: ignore[no-untyped-call]
        scores_TK, chosen_TK = logits_TE.topk(self.experts.num_experts_per_token, dim=1)
        sent_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(1, chosen_TK, True)
        learns = self.training and torch.is_grad_enabled()  # not in the first pass of recomputed layers
        if learns:
            logits_TE = self._with_losses(logits_TE, sent_TE)
            scores_TK = logits_TE.gather(1, chosen_TK)
        weights_TE = torch.zeros_like(logits_TE).scatter(1, chosen_TK, scores_TK.softmax(dim=1))
        if self.training and self.experts.capacity_factor is not None:
            taken_TE = self._within_capacity(weights_TE.detach(), sent_TE, self.experts.capacity_factor)
            if learns:
                self.totals.sums[2] += 1.0 / self.group.size() - taken_TE.sum() / (sent_TE.sum() * self.group.size())
            return weights_TE * taken_TE, taken_TE
        return weights_TE, sent_TE

    def _with_losses(self, logits_TE: Tensor, sent_TE: Tensor) -> Tensor:
        """The logits, in whose gradient is that of this rank's share of the losses of the micro-batch."""
        experts = self.experts
        num_tokens = logits_TE.size(0) * self.group.size()
        counts_E = sent_TE.sum(dim=0, dtype=torch.float32)
        if self.group.size() > 1:
            dist.all_reduce(counts_E, group=self.group)
        probability_E = logits_TE.softmax(dim=1).sum(dim=0)
        scale = experts.num_experts / (experts.num_experts_per_token * num_tokens**2)
        balance = scale * (probability_E * counts_E).sum()
        z = logits_TE.logsumexp(dim=1).square().sum() / num_tokens
        self.totals.sums[:2] += torch.stack((balance, z)).detach()
        loss = experts.balance_loss * balance + experts.router_z_loss * z
        return cast(Tensor, MoEAuxLossAutoScaler.apply(logits_TE, loss * self.totals.weight))

    def _within_capacity(self, weights_TE: Tensor, sent_TE: Tensor, factor: float) -> Tensor:
        """Which tokens experts take: of a micro-batch's, those with the largest weights. Ties are all taken."""
        experts = self.experts
        num_tokens = weights_TE.size(0) * self.group.size()
        share = num_tokens * experts.num_experts_per_token / experts.num_experts
        capacity = math.ceil(factor * share)
        if capacity >= num_tokens:
            return sent_TE
        everyone_TE = all_gather(weights_TE, self.group) if self.group.size() > 1 else weights_TE
        least_E = everyone_TE.topk(capacity, dim=0, sorted=True).values[-1]
        return sent_TE & (weights_TE >= least_E)


class _Float32Linear(torch.autograd.Function):
    """Tokens times the transpose of the weight, in float32, of which no copies are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, tokens_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_TD, weight_ED)
        return linear(tokens_TD.float(), weight_ED.float())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient_TE,) = gradients
        tokens_TD, weight_ED = ctx.saved_tensors
        tokens_gradient_TD = gradient_TE @ weight_ED.float()
        weight_gradient_ED = gradient_TE.T @ tokens_TD.float()
        return tokens_gradient_TD.to(tokens_TD.dtype), weight_gradient_ED.to(weight_ED.dtype)


class GroupedExperts(torch.nn.Module):
    """This rank's experts, each a SwiGLU network, with all of their products as one grouped one.

    Tensor ranks hold slices of every expert's width; the dispatcher gathers tokens before and adds results up after.
    """

    def __init__(self, num_local_experts: int, config: Any, pg_collection: Any) -> None:
        super().__init__()
        hidden = config.hidden_size
        width = config.moe_ffn_hidden_size // pg_collection.expt_tp.size()

        def matrices(num_rows: int, num_columns: int) -> GroupedLinear:
            shape = (num_local_experts, num_rows, num_columns)
            made = GroupedLinear(torch.empty(shape, dtype=config.params_dtype, device=this_device()))
            # Megatron reduces gradients of parameters marked so over the ranks that hold the same experts.
            made.weight.allreduce = config.expert_model_parallel_size == 1  # type: ignore[attr-defined]
            return made

        self.gate_up = matrices(2 * width, hidden)
        self.down = matrices(hidden, width)

    def forward(self, tokens_ND: Tensor, tokens_per_expert_L: Tensor, weights_N: Tensor) -> tuple[Tensor, None]:
        """Each token through its expert, times its weight; tokens are in order of their experts.

        Returns:
            (N, D) sums over this tensor rank's part of the width, and no bias.
        """
        ends_L = tokens_per_expert_L.cumsum(0)
        gate_up_N2F = self.gate_up(tokens_ND, ends_L)
        inner_NF = weighted_bias_swiglu_impl(gate_up_N2F, None, weights_N.unsqueeze(-1))
        return self.down(inner_NF, ends_L), None


class GroupedLinear(torch.nn.Module):
    """A matrix for each of this rank's experts, which its tokens are multiplied by the transpose of."""

    def __init__(self, weight_LOI: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight_LOI)

    def forward(self, tokens_NI: Tensor, ends_L: Tensor) -> Tensor:
        """See `grouped_linear`."""
        return grouped_linear(tokens_NI, self.weight, ends_L)


def grouped_linear(tokens_NI: Tensor, weights_LOI: Tensor, ends_L: Tensor) -> Tensor:
    """Tokens [ends[i - 1], ends[i]) times the transpose of the i-th of L weights, (N, O)."""
    if has_grouped_kernel(tokens_NI, weights_LOI):
        ends = ends_L.to(device=tokens_NI.device, dtype=torch.int32, non_blocking=True)
        return torch.nn.functional.grouped_mm(tokens_NI, weights_LOI.transpose(1, 2), offs=ends)
    parts = tokens_NI.tensor_split(ends_L.cpu()[:-1])
    return torch.cat([linear(part, weight) for part, weight in zip(parts, weights_LOI, strict=True)])


def has_grouped_kernel(tokens_NI: Tensor, weights_LOI: Tensor) -> bool:
    """Whether torch multiplies these groups at once: rows of 16 bytes, and on a GPU bf16 (compute capability 8.0)."""
    aligned = all(size * tokens_NI.element_size() % ALIGNMENT_BYTES == 0 for size in weights_LOI.shape[1:])
    if not aligned or not hasattr(torch.nn.functional, "grouped_mm"):
        return False
    on_gpu = tokens_NI.device.type == "cuda"
    return not on_gpu or (tokens_NI.dtype == torch.bfloat16 and torch.cuda.get_device_capability() >= (8, 0))
