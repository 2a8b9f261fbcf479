"""Importance without text, to compare activation importance with: by the size of weights, or drawn at random.

Shape suffixes: N norms, L layers, D hidden channels, E experts, F feed-forward neurons, H heads.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from conf.schema import ModelConfig
from data.order import key_of
from parallel.device import this_device
from parallel.engine import TensorSource
from parallel.importance import Importance
from parallel.pruning import DIMS_OF_LAYER, NORMS_OF_LAYER
from parallel.weight_names import EMBEDDING, OUTPUT, logical_shapes, of_any_expert


def magnitude_importance(source: TensorSource, model: ModelConfig) -> Importance:
    """L2 norms of the weights that belong to each part; all ranks take part, each reads a share of the tensors."""
    importance = Importance.zeros(model)
    shapes = logical_shapes(model)
    for position, (name, shape) in enumerate(shapes.items()):
        if position % dist.get_world_size() == dist.get_rank():
            squares = source.read(name, (0,) * len(shape), shape).double().square()
            _add(importance, model, name, squares)
    for scores in importance.tensors().values():
        shared = scores.to(this_device())
        dist.all_reduce(shared)
        scores.copy_(shared).sqrt_()
    importance.energy_ND.fill_(1.0)
    importance.require_finite()
    return importance


def random_importance(model: ModelConfig, seed: int) -> Importance:
    """Uniform scores that depend on the seed alone. The first layer stays here too: without it no model recovers."""
    random = np.random.default_rng(key_of(seed, "random importance"))
    importance = Importance.zeros(model)
    for scores in importance.tensors().values():
        scores.copy_(torch.from_numpy(random.random(scores.shape)))
    importance.energy_ND.fill_(1.0)
    return importance


def _add(importance: Importance, model: ModelConfig, name: str, squares: Tensor) -> None:
    if name in (EMBEDDING, OUTPUT):
        importance.hidden_ND.add_(squares.sum(dim=0))
        return
    _, _, number, *rest = name.split(".", 3)
    if not rest:
        return  # the final norm
    layer, (part, expert) = int(number), of_any_expert(rest[0])
    if part in NORMS_OF_LAYER:
        return
    importance.layers_L[layer] += squares.sum()
    rows, columns = DIMS_OF_LAYER[part]
    for dim, kind in enumerate((rows, columns)):
        sums = squares.sum(dim=1 - dim)
        if kind == "hidden":
            importance.hidden_ND.add_(sums)
        elif kind == "ffn":
            importance.ffn_LEF[layer, expert] += sums
            importance.experts_LE[layer, expert] += sums.sum()
        elif kind == "queries":
            importance.heads_LH[layer] += sums.view(model.num_attention_heads, -1).sum(dim=1)
