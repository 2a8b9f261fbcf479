"""How much each part of a model matters: hidden channels, feed-forward neurons, attention heads and layers.

Activation importance (Muralidharan et al. 2024, "Compact language models via pruning and knowledge distillation") needs
forward passes only. `Observer` hangs on the chunks of one rank and adds up; what it returns is the same on every rank
and whatever the mesh, because every sum is over the whole batch and the whole sequence before anything is squared.

Shape suffixes: N norms (two a layer, then the final one), L layers, D hidden channels, F feed-forward neurons, H heads,
S tokens here, B rows.
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
        ffn_LF: of the feed-forward neurons.
        heads_LH: of the query heads.
        layers_L: of the layers: their block influence, 1 - cosine of what goes in and what comes out.
        energy_ND: mean square of what goes into each norm, over the mean of all channels; pruned norms are rescaled
            by it.
    """

    hidden_ND: Tensor
    ffn_LF: Tensor
    heads_LH: Tensor
    layers_L: Tensor
    energy_ND: Tensor

    @classmethod
    def zeros(cls, model: ModelConfig, device: torch.device | None = None) -> Importance:
        """All scores 0."""
        norms = 2 * model.num_layers + 1
        shapes = (
            (norms, model.hidden_size),
            (model.num_layers, model.ffn_hidden_size),
            (model.num_layers, model.num_attention_heads),
            (model.num_layers,),
            (norms, model.hidden_size),
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
            rows = scores.unsqueeze(-1).flatten(1)
            wrong = [row for row in range(len(rows)) if not bool(rows[row].isfinite().all())]
            if wrong:
                part = "norms" if name.endswith("_ND") else "layers"
                raise FloatingPointError(
                    f"importance {name.rpartition('_')[0]} is not finite in {part} {wrong}: activations overflow. "
                    "Prune a checkpoint whose loss is finite, or calibrate in another precision."
                )


class Observer:
    """Adds up what passes through the chunks of one rank.

    Args:
        model: shape of the whole model.
        device: where the sums are kept.
        sequence_group: ranks over which the tokens of one row are split outside tensor-parallel regions.
        context_group: ranks over which they are split inside them.
        num_micro_batches: calls of each module that count; an interleaved schedule may add some to fill its rounds.
    """

    def __init__(
        self,
        model: ModelConfig,
        device: torch.device,
        *,
        sequence_group: dist.ProcessGroup,
        context_group: dist.ProcessGroup,
        num_micro_batches: int,
    ) -> None:
        self.sums = Importance.zeros(model, device)
        self._model = model
        self._sequence_group = sequence_group
        self._context_group = context_group
        self._num_micro_batches = num_micro_batches
        self._num_calls: dict[str, int] = {}

    @contextmanager
    def watching(self, chunks: Sequence[Any], *, tensor_rank: int) -> Iterator[None]:
        """While open, forward passes of Megatron's GPTModel chunks are added up."""
        handles: list[Any] = []
        try:
            for chunk in chunks:
                for layer in chunk.decoder.layers:
                    handles += self._watch_layer(layer, layer.layer_number - 1, tensor_rank)
                final = getattr(chunk.decoder, "final_layernorm", None)
                if final is not None:
                    handles.append(final.register_forward_hook(partial(self._on_norm, 2 * self._model.num_layers)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch_layer(self, layer: Any, number: int, tensor_rank: int) -> list[Any]:
        attention_out, ffn_out = layer.self_attention.linear_proj, layer.mlp.linear_fc2
        return [
            layer.register_forward_hook(partial(self._on_layer, number), with_kwargs=True),
            layer.input_layernorm.register_forward_hook(partial(self._on_norm, 2 * number)),
            layer.pre_mlp_layernorm.register_forward_hook(partial(self._on_norm, 2 * number + 1)),
            attention_out.register_forward_pre_hook(partial(self._on_heads, number, tensor_rank)),
            ffn_out.register_forward_pre_hook(partial(self._on_ffn, number, tensor_rank)),
        ]

    def _counts(self, key: str) -> bool:
        self._num_calls[key] = self._num_calls.get(key, 0) + 1
        return self._num_calls[key] <= self._num_micro_batches

    def _on_norm(self, norm: int, module: Any, given: tuple[Tensor, ...], output_SBD: Tensor) -> None:
        if not self._counts(f"norm {norm}"):
            return
        self.sums.hidden_ND[norm] += _squared_means(output_SBD.abs(), self._sequence_group)
        squares_SBD = given[0].float().square()
        relative_SBD = squares_SBD / squares_SBD.mean(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        self.sums.energy_ND[norm] += _means(relative_SBD, self._sequence_group).sum(dim=0)

    def _on_ffn(self, layer: int, tensor_rank: int, module: Any, given: tuple[Tensor, ...]) -> None:
        if self._counts(f"ffn {layer}"):
            scores = _squared_means(given[0].abs(), self._context_group)
            first = tensor_rank * len(scores)
            self.sums.ffn_LF[layer, first : first + len(scores)] += scores

    def _on_heads(self, layer: int, tensor_rank: int, module: Any, given: tuple[Tensor, ...]) -> None:
        if self._counts(f"heads {layer}"):
            output_SBHD = given[0].view(*given[0].shape[:-1], -1, self._model.head_dim)
            norms_SBH = torch.linalg.vector_norm(output_SBHD, dim=-1, dtype=torch.float32)
            scores = _squared_means(norms_SBH, self._context_group)
            first = tensor_rank * len(scores)
            self.sums.heads_LH[layer, first : first + len(scores)] += scores

    def _on_layer(self, number: int, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._counts(f"layer {number}"):
            before_SBD = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            after_SBD = output[0] if isinstance(output, tuple) else output
            cosine_SB = torch.nn.functional.cosine_similarity(before_SBD.float(), after_SBD.float(), dim=-1)
            self.sums.layers_L[number] += _means(1.0 - cosine_SB, self._sequence_group).sum()

    def importance(self, *, counts_whole: bool, counts_slices: bool, num_rows: int) -> Importance:
        """Add up over all ranks; every rank takes part.

        Args:
            counts_whole: this rank adds what all tensor and context ranks hold alike.
            counts_slices: this rank adds its slice of what tensor ranks share out and context ranks hold alike.
            num_rows: of the whole calibration batch.
        """
        for name, tensor in self.sums.tensors().items():
            if not (counts_slices if name in ("ffn_LF", "heads_LH") else counts_whole):
                tensor.zero_()
            dist.all_reduce(tensor)
        sums = self.sums
        importance = Importance(
            hidden_ND=sums.hidden_ND.sqrt().cpu(),
            ffn_LF=sums.ffn_LF.sqrt().cpu(),
            heads_LH=sums.heads_LH.sqrt().cpu(),
            layers_L=(sums.layers_L / num_rows).cpu(),
            energy_ND=(sums.energy_ND / num_rows).cpu(),
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
