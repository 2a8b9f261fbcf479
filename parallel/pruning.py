"""A smaller model cut out of a larger one: which parts stay, and their weights as a source any box is read from.

Hidden channels are the same everywhere, since the residual stream joins all layers; each layer keeps heads and experts
of its own and each expert neurons of its own, equally many, so the result is an ordinary model of a smaller shape. A
dense layer is one expert. Rows of routers go with their experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from conf.errors import CheckpointError
from conf.schema import ModelConfig
from parallel.engine import TensorSource
from parallel.importance import Importance
from parallel.weight_names import EMBEDDING, FINAL_NORM, OUTPUT, ROUTER, logical_shapes, of_any_expert, of_expert

Indices = npt.NDArray[np.int64]
Dim = Literal["vocabulary", "hidden", "experts", "ffn", "queries", "keys"]

DIMS_OF_LAYER: dict[str, tuple[Dim, ...]] = {
    "input_layernorm.weight": ("hidden",),
    "self_attn.q_proj.weight": ("queries", "hidden"),
    "self_attn.k_proj.weight": ("keys", "hidden"),
    "self_attn.v_proj.weight": ("keys", "hidden"),
    "self_attn.o_proj.weight": ("hidden", "queries"),
    "post_attention_layernorm.weight": ("hidden",),
    "mlp.gate_proj.weight": ("ffn", "hidden"),
    "mlp.up_proj.weight": ("ffn", "hidden"),
    "mlp.down_proj.weight": ("hidden", "ffn"),
    ROUTER: ("experts", "hidden"),
    "block_sparse_moe.experts.w1.weight": ("ffn", "hidden"),
    "block_sparse_moe.experts.w3.weight": ("ffn", "hidden"),
    "block_sparse_moe.experts.w2.weight": ("hidden", "ffn"),
}
"""By the name that all experts of a layer have in common."""
NORMS_OF_LAYER = {"input_layernorm.weight": 0, "post_attention_layernorm.weight": 1}


@dataclass(frozen=True, slots=True)
class Kept:
    """Which parts of a model stay, ascending.

    Attributes:
        layers: numbers of the layers.
        hidden: channels.
        experts: of each layer that stays.
        ffn: neurons of each expert that stays, of each layer that stays.
        groups: key-value groups of each layer that stays.
        heads: query heads of each layer that stays, in the order of its groups.
        norm_scales: what to multiply the weights of each norm by (two a layer, then the final one): a norm divides by
            the mean over channels, and those that stay are not the average ones.
    """

    layers: Indices
    hidden: Indices
    experts: tuple[Indices, ...]
    ffn: tuple[tuple[Indices, ...], ...]
    groups: tuple[Indices, ...]
    heads: tuple[Indices, ...]
    norm_scales: tuple[float, ...]


def most_important(importance: Importance, parent: ModelConfig, shape: ModelConfig) -> Kept:
    """The parts with the highest scores, as many as the smaller shape has. The first layer always stays."""
    layers = np.concatenate([[0], 1 + _largest(importance.layers_L[1:], shape.num_layers - 1)]).astype(np.int64)
    norms = [norm for layer in layers for norm in (2 * layer, 2 * layer + 1)] + [2 * parent.num_layers]
    # Norms of one model are of one size; of different models they need not be, so each counts by its own mean.
    hidden_ND = importance.hidden_ND[norms]
    hidden_D = (hidden_ND / hidden_ND.mean(dim=1, keepdim=True).clamp_min(1e-300)).sum(dim=0)
    hidden = _largest(hidden_D, shape.hidden_size)
    groups, heads, experts, ffn = [], [], [], []
    for layer in layers:
        experts.append(_largest(importance.experts_LE[layer], shape.num_experts))
        ffn.append(tuple(_largest(importance.ffn_LEF[layer, e], shape.ffn_hidden_size) for e in experts[-1]))
        score_GQ = importance.heads_LH[layer].view(parent.num_kv_heads, -1)
        kept = _largest(score_GQ.square().sum(dim=1), shape.num_kv_heads)
        per_group = shape.num_attention_heads // shape.num_kv_heads
        groups.append(kept)
        heads.append(np.concatenate([g * score_GQ.size(1) + _largest(score_GQ[g], per_group) for g in kept.tolist()]))
    energy_ND = importance.energy_ND[norms]
    scales = (energy_ND[:, hidden].mean(dim=1) / energy_ND.mean(dim=1).clamp_min(1e-300)).sqrt()
    return Kept(
        layers=layers,
        hidden=hidden,
        experts=tuple(experts),
        ffn=tuple(ffn),
        groups=tuple(groups),
        heads=tuple(heads),
        norm_scales=tuple(scales.tolist()),
    )


def retained(importance: Importance, kept: Kept) -> float:
    """Share of all importance that stays, a number between 0 and 1 to order shapes by before any is tried."""

    def mean_share(scores_LX: Tensor, kept_L: tuple[Indices, ...]) -> float:
        pairs = zip(kept.layers.tolist(), kept_L, strict=True)
        return float(np.mean([_share(scores_LX[layer : layer + 1], places) for layer, places in pairs]))

    neurons = [
        _share(importance.ffn_LEF[layer, expert : expert + 1], places)
        for layer, experts, kept_E in zip(kept.layers.tolist(), kept.experts, kept.ffn, strict=True)
        for expert, places in zip(experts.tolist(), kept_E, strict=True)
    ]
    shares = [
        _share(importance.hidden_ND, kept.hidden),
        _share(importance.layers_L.unsqueeze(0), kept.layers),
        mean_share(importance.experts_LE, kept.experts),
        float(np.mean(neurons)),
        mean_share(importance.heads_LH, kept.heads),
    ]
    return math.prod(shares)


class PrunedWeights:
    """The weights of a pruned model, read from its parent's. Implements `TensorSource`; holds no weights itself.

    Args:
        source: the parent's weights.
        parent: the parent's shape.
        shape: the pruned model's.
        kept: what stays.
    """

    def __init__(self, source: TensorSource, parent: ModelConfig, shape: ModelConfig, kept: Kept) -> None:
        self._source = source
        self._parent_shapes = logical_shapes(parent)
        self._shapes = logical_shapes(shape)
        self._head_dim = parent.head_dim
        self._vocab_size = parent.vocab_size
        self._kept = kept

    def read(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """See `TensorSource.read`."""
        whole = self._shapes.get(name)
        if whole is None:
            raise CheckpointError(f"{name}: the pruned model has no such weight")
        if len(offset) != len(whole) or any(
            start < 0 or start + size > all_ for start, size, all_ in zip(offset, shape, whole, strict=True)
        ):
            raise CheckpointError(f"{name}: the box at {offset} of shape {shape} is outside its shape {whole}")
        parent_name, layer, expert, dims = self._origin(name)
        wanted = [
            self._indices(dim, layer, expert)[start : start + size]
            for dim, start, size in zip(dims, offset, shape, strict=True)
        ]
        if any(len(indices) == 0 for indices in wanted):
            return torch.empty(shape)
        # The smallest box of the parent around what is wanted: of a third that is cut, little is read in vain.
        first = tuple(int(indices[0]) for indices in wanted)
        extent = tuple(int(indices[-1]) - start + 1 for indices, start in zip(wanted, first, strict=True))
        values = self._source.read(parent_name, first, extent)
        for dim, (indices, start) in enumerate(zip(wanted, first, strict=True)):
            if len(indices) != values.size(dim):
                values = values.index_select(dim, torch.from_numpy(indices - start))
        scale = self._norm_scale(name, layer)
        return values if scale == 1.0 else values * scale

    def _origin(self, name: str) -> tuple[str, int, int, tuple[Dim, ...]]:
        """The parent's name, the layer (-1: none) and the expert in the pruned model, and what the dims are."""
        match name.split(".", 3):
            case ["model", "layers", number, rest]:
                layer, (part, expert) = int(number), of_any_expert(rest)
                its = of_expert(part, int(self._kept.experts[layer][expert]))
                return f"model.layers.{self._kept.layers[layer]}.{its}", layer, expert, DIMS_OF_LAYER[part]
        dims: dict[str, tuple[Dim, ...]] = {
            EMBEDDING: ("vocabulary", "hidden"),
            OUTPUT: ("vocabulary", "hidden"),
            FINAL_NORM: ("hidden",),
        }
        return name, -1, 0, dims[name]

    def _indices(self, dim: Dim, layer: int, expert: int) -> Indices:
        match dim:
            case "vocabulary":
                return np.arange(self._vocab_size, dtype=np.int64)
            case "hidden":
                return self._kept.hidden
            case "experts":
                return self._kept.experts[layer]
            case "ffn":
                return self._kept.ffn[layer][expert]
            case "queries":
                return self._whole_heads(self._kept.heads[layer])
            case "keys":
                return self._whole_heads(self._kept.groups[layer])

    def _whole_heads(self, heads: Indices) -> Indices:
        return (heads[:, None] * self._head_dim + np.arange(self._head_dim)).reshape(-1)

    def _norm_scale(self, name: str, layer: int) -> float:
        if name == FINAL_NORM:
            return self._kept.norm_scales[-1]
        norm = NORMS_OF_LAYER.get(name.split(".", 3)[-1]) if layer >= 0 else None
        return 1.0 if norm is None else self._kept.norm_scales[2 * layer + norm]


def _largest(scores: Tensor, count: int) -> Indices:
    """Places of the largest scores, ascending; of equal ones the first, so that every rank chooses alike."""
    order: Indices = np.argsort(-scores.numpy(), kind="stable")[:count].astype(np.int64)
    return np.sort(order)


def _share(scores_XY: Tensor, places: Indices) -> float:
    total = float(scores_XY.sum())
    return float(scores_XY[:, places].sum()) / total if total > 0 else 1.0
