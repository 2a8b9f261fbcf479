"""SmoothQuant: outliers of what goes into a matrix are moved into the matrix, where a scale a row holds them better.

A channel that reaches far makes its token's scale coarse for all the others (Xiao et al. 2023). What makes the channel
is divided by a factor and the matrix's column multiplied by it: norms before attention and feed-forward, and the rows
of the up projection before the down projection. Factors are powers of two: until something is rounded, no bit of what
the model says changes.

Shape suffixes: L layers, D hidden channels, F feed-forward neurons, O rows and I columns of a weight, X channels.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from conf.schema import ModelConfig
from parallel.device import this_device
from parallel.engine import TensorSource
from parallel.ranges import Channels
from parallel.weight_names import logical_shapes

READERS = {
    "attention_LD": tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
    "mlp_LD": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "down_LF": ("mlp.down_proj.weight",),
}
"""Channels -> matrices of a layer whose columns they are."""
MAKERS = {
    "attention_LD": "input_layernorm.weight",
    "mlp_LD": "post_attention_layernorm.weight",
    "down_LF": "mlp.up_proj.weight",
}
"""Channels -> the weight of a layer whose rows make them."""


def smoothing_factors(ranges: Channels, weights: TensorSource, model: ModelConfig, strength: float) -> Channels:
    """What each channel is to be divided by: range of inputs ** strength / range of weights ** (1 - strength).

    Every rank takes part; each reads the matrices of some layers.

    Args:
        ranges: largest absolute value of each channel on calibration text.
        weights: of the model.
        model: its shape.
        strength: how much of the difficulty goes to the weights (SmoothQuant's alpha), 0 to 1.
    """
    shapes = _matrix_shapes(model)
    factors = Channels.filled(model, 0.0)
    for number in range(dist.get_rank(), model.num_layers, dist.get_world_size()):
        for name, factors_LX in factors.items():
            reach_I = torch.zeros(factors_LX.size(1))
            for part in READERS[name]:
                weight_OI = weights.read(f"model.layers.{number}.{part}", (0, 0), shapes[part])
                reach_I = torch.maximum(reach_I, weight_OI.abs().amax(dim=0).float())
            exponent_I = strength * getattr(ranges, name)[number].log2() - (1.0 - strength) * reach_I.log2()
            # A channel that is always 0, or that nobody reads, has nothing to move.
            exponent_I = torch.where(exponent_I.isfinite(), exponent_I, torch.zeros_like(exponent_I))
            factors_LX[number] = torch.exp2(exponent_I.round())
    for _, factors_LX in factors.items():
        summed_LX = factors_LX.to(this_device())
        dist.all_reduce(summed_LX)
        factors_LX.copy_(summed_LX)
    return factors


def _matrix_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    first = "model.layers.0."
    return {name.removeprefix(first): shape for name, shape in logical_shapes(model).items() if name.startswith(first)}


class SmoothedWeights:
    """Weights after smoothing; the model says the same. Implements `TensorSource`; holds no weights itself.

    Args:
        source: the weights before.
        factors: what each channel is divided by where it is made, and multiplied by where it is read.
    """

    def __init__(self, source: TensorSource, factors: Channels) -> None:
        self._source = source
        self._factors = dict(factors.items())

    def read(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """See `TensorSource.read`."""
        tensor = self._source.read(name, offset, shape)
        match name.split(".", 3):
            case ["model", "layers", number, part]:
                for channels, factors_LX in self._factors.items():
                    factors_X = factors_LX[int(number)].to(tensor.dtype)
                    if part in READERS[channels]:
                        tensor = tensor * factors_X[offset[1] : offset[1] + shape[1]]
                    if part == MAKERS[channels]:
                        mine_X = factors_X[offset[0] : offset[0] + shape[0]]
                        tensor = tensor / mine_X.view(-1, *[1] * (tensor.dim() - 1))
        return tensor
