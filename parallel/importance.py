"""How much each part of a model matters: hidden channels, experts, feed-forward neurons, heads and layers.

Activation importance (Muralidharan et al. 2024, "Compact language models via pruning and knowledge distillation") needs
forward passes only. `Observer` hangs on the chunks of one rank and adds up; what it returns is the same on every rank
and whatever the mesh, because every sum is over the whole batch and the whole sequence before anything is squared. What
is sent to experts has left its row, and is added up token by token.

Shape suffixes: N norms (two a layer, then the final one), L layers, D hidden channels, E experts (1 in a dense model),
F feed-forward neurons, H heads, S tokens here, B rows, T tokens sent to this rank's experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conf.schema import ModelConfig


@dataclass(frozen=True, slots=True)
class Importance:
    """Scores of the parts of a model, larger matters more; float64, on the CPU, the same on every rank.

    Only the order of scores within a row means anything.

    Attributes:
        hidden_ND: of the hidden channels, at the output of each norm.
        ffn_LEF: of the feed-forward neurons.
        heads_LH: of the query heads.
        layers_L: of the layers: their block influence, 1 - cosine of what goes in and what comes out.
        energy_ND: mean square of what goes into each norm, over the mean of all channels; pruned norms are rescaled
            by it.
        experts_LE: of the experts; 0 in a dense model.
    """

    hidden_ND: Tensor
    ffn_LEF: Tensor
    heads_LH: Tensor
    layers_L: Tensor
    energy_ND: Tensor
    experts_LE: Tensor

    @classmethod
    def zeros(cls, model: ModelConfig, device: torch.device | None = None) -> Importance:
        """All scores 0."""
        norms = 2 * model.num_layers + 1
        shapes = (
            (norms, model.hidden_size),
            (model.num_layers, model.num_experts, model.ffn_hidden_size),
            (model.num_layers, model.num_attention_heads),
            (model.num_layers,),
            (norms, model.hidden_size),
            (model.num_layers, model.num_experts),
        )
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def tensors(self) -> dict[str, Tensor]:
        """The scores by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def require_finite(self) -> None:
        """Refuse scores that cannot be ordered.

        Raises:
            FloatingPointError: names the scores and the layers that are not finite.
        """
        for name, scores in self.tensors().items():
            rows = scores.reshape(len(scores), -1)
            wrong = [row for row in range(len(rows)) if not bool(rows[row].isfinite().all())]
            if wrong:
                part = "norms" if name.endswith("_ND") else "layers"
                raise FloatingPointError(
                    f"importance {name.rpartition('_')[0]} is not finite in {part} {wrong}: activations overflow. "
                    "Prune a checkpoint whose loss is finite, or calibrate in another precision."
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What of the tokens and of the neurons a rank sees.

    Attributes:
        tensor_rank: which slice of heads and neurons.
        context_rank: which part of each row inside tensor-parallel regions.
        experts: numbers of this rank's experts.
        sequence_group: ranks over which the tokens of one row are split outside tensor-parallel regions.
        context_group: ranks over which they are split inside them.
        expert_tensor_group: ranks that hold the other slices of this rank's experts, and are given the same tokens.
    """

    tensor_rank: int
    context_rank: int
    experts: range
    sequence_group: dist.ProcessGroup
    context_group: dist.ProcessGroup
    expert_tensor_group: dist.ProcessGroup


class Observer:
    """Adds up what passes through the chunks of one rank.

    Args:
        model: shape of the whole model.
        device: where the sums are kept.
        share: what of it this rank sees.
        num_micro_batches: calls of each module that count; an interleaved schedule may add some to fill its rounds.
    """

    def __init__(self, model: ModelConfig, device: torch.device, share: Share, *, num_micro_batches: int) -> None:
        self.sums = Importance.zeros(model, device)
        self._model = model
        self._share = share
        self._num_micro_batches = num_micro_batches
        self._num_calls: dict[str, int] = {}

    @contextmanager
    def watching(self, chunks: Sequence[Any]) -> Iterator[None]:
        """While open, forward passes of Megatron's GPTModel chunks are added up."""
        handles: list[Any] = []
        try:
            for chunk in chunks:
                for layer in chunk.decoder.layers:
                    handles += self._watch_layer(layer, layer.layer_number - 1)
                final = getattr(chunk.decoder, "final_layernorm", None)
                if final is not None:
                    handles.append(final.register_forward_hook(partial(self._on_norm, 2 * self._model.num_layers)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch_layer(self, layer: Any, number: int) -> list[Any]:
        if self._model.experts is None:
            feed_forward = layer.mlp.linear_fc2.register_forward_pre_hook(partial(self._on_ffn, number))
        else:
            feed_forward = layer.mlp.experts.down.register_forward_hook(partial(self._on_experts, number))
        heads = layer.self_attention.linear_proj.register_forward_pre_hook(partial(self._on_heads, number))
        return [
            layer.register_forward_hook(partial(self._on_layer, number), with_kwargs=True),
            layer.input_layernorm.register_forward_hook(partial(self._on_norm, 2 * number)),
            layer.pre_mlp_layernorm.register_forward_hook(partial(self._on_norm, 2 * number + 1)),
            heads,
            feed_forward,
        ]

    def _counts(self, key: str) -> bool:
        self._num_calls[key] = self._num_calls.get(key, 0) + 1
        return self._num_calls[key] <= self._num_micro_batches

    def _on_norm(self, norm: int, module: Any, given: tuple[Tensor, ...], output_SBD: Tensor) -> None:
        if not self._counts(f"norm {norm}"):
            return
        self.sums.hidden_ND[norm] += _squared_means(output_SBD.abs(), self._share.sequence_group)
        squares_SBD = given[0].float().square()
        relative_SBD = squares_SBD / squares_SBD.mean(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        self.sums.energy_ND[norm] += _means(relative_SBD, self._share.sequence_group).sum(dim=0)

    def _on_ffn(self, layer: int, module: Any, given: tuple[Tensor, ...]) -> None:
        if self._counts(f"ffn {layer}"):
            self._add_slice(self.sums.ffn_LEF[layer, 0], _squared_means(given[0].abs(), self._share.context_group))

    def _on_experts(self, layer: int, module: Any, given: tuple[Tensor, ...], output_TD: Tensor) -> None:
        """What goes into the down projection, and what comes out, has been multiplied by the router's weight."""
        if not self._counts(f"experts {layer}"):
            return
        inner_TF, ends_E = given
        if self._share.expert_tensor_group.size() > 1:
            output_TD = output_TD.clone()
            dist.all_reduce(output_TD, group=self._share.expert_tensor_group)
        norms_T = torch.linalg.vector_norm(output_TD, dim=-1, dtype=torch.float32)
        starts_E = (0, *ends_E.tolist()[:-1])
        for expert, start, end in zip(self._share.experts, starts_E, ends_E.tolist(), strict=True):
            squares_F = inner_TF[start:end].float().square().sum(dim=0)
            self._add_slice(self.sums.ffn_LEF[layer, expert], squares_F.double())
            self.sums.experts_LE[layer, expert] += norms_T[start:end].square().sum()

    def _on_heads(self, layer: int, module: Any, given: tuple[Tensor, ...]) -> None:
        if self._counts(f"heads {layer}"):
            output_SBHD = given[0].view(*given[0].shape[:-1], -1, self._model.head_dim)
            norms_SBH = torch.linalg.vector_norm(output_SBHD, dim=-1, dtype=torch.float32)
            self._add_slice(self.sums.heads_LH[layer], _squared_means(norms_SBH, self._share.context_group))

    def _add_slice(self, sums_X: Tensor, scores: Tensor) -> None:
        """Add the scores of this tensor rank's neurons or heads where they belong."""
        first = self._share.tensor_rank * len(scores)
        sums_X[first : first + len(scores)] += scores

    def _on_layer(self, number: int, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._counts(f"layer {number}"):
            before_SBD = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            after_SBD = output[0] if isinstance(output, tuple) else output
            cosine_SB = torch.nn.functional.cosine_similarity(before_SBD.float(), after_SBD.float(), dim=-1)
            self.sums.layers_L[number] += _means(1.0 - cosine_SB, self._share.sequence_group).sum()

    def importance(self, *, num_rows: int) -> Importance:
        """Add up over all ranks; every rank takes part.

        Args:
            num_rows: of the whole calibration batch.
        """
        tensor_rank, context_rank = self._share.tensor_rank, self._share.context_rank
        for name, tensor in self.sums.tensors().items():
            # What others hold alike is added by one of them. No other rank was sent the tokens of this one's experts.
            from_experts = name == "experts_LE" or (name == "ffn_LEF" and self._model.experts is not None)
            in_slices = name in ("ffn_LEF", "heads_LH")
            if (tensor_rank and not in_slices) or (context_rank and not from_experts):
                tensor.zero_()
            dist.all_reduce(tensor)
        sums = self.sums
        importance = Importance(
            hidden_ND=sums.hidden_ND.sqrt().cpu(),
            ffn_LEF=sums.ffn_LEF.sqrt().cpu(),
            heads_LH=sums.heads_LH.sqrt().cpu(),
            layers_L=(sums.layers_L / num_rows).cpu(),
            energy_ND=(sums.energy_ND / num_rows).cpu(),
            experts_LE=sums.experts_LE.sqrt().cpu(),
        )
        importance.require_finite()
        return importance


def _means(values_SBX: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Mean over the tokens of each whole row, float64, without the first dim."""
    sums = values_SBX.sum(dim=0, dtype=torch.float32)
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
    return sums.double() / (values_SBX.size(0) * group.size())


def _squared_means(values_SBX: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over rows of the squared mean over tokens, float64, shape (X,)."""
    return _means(values_SBX, group).square().sum(dim=0)
