"""INT8 and FP8 weights and inputs of linear layers, computed in floating point: what a kernel would see, on any device.

Weights have a scale a row (output channel); inputs, where they are rounded too, one a token, found as it comes. The
embedding, the norms and the output head stay as they are.

Scales of weights are numbers that bfloat16 has, so that an export in bfloat16 says the same as one in float32.

Shape suffixes: O rows and I columns of a weight, X any dims before the last.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conf.schema import Scheme
from parallel.engine import TensorSource

FP8 = torch.float8_e4m3fn
# Weights use -127 to 127. Inputs use the whole range as compressed-tensors has it: the largest is 127.5 steps.
WEIGHT_STEPS = 127.0
INPUT_STEPS = 127.5
FP8_LARGEST = torch.finfo(FP8).max


def is_quantised(name: str, kept_layers: Collection[int]) -> bool:
    """Whether a weight, by its canonical name, is rounded: a layer's matrices, unless the layer is kept as it is.

    Of a mixture, those of the experts, and not the router's.
    """
    match name.split("."):
        case ["model", "layers", number, *_, part, "weight"]:
            return part.endswith(("_proj", "w1", "w2", "w3")) and int(number) not in kept_layers
    return False


def quantised_rows(weight_OI: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Values (O, I), INT8 or FP8, and float32 scales (O, 1) whose product is nearest to the weight, row by row.

    Rounding what is rounded changes nothing, so values and scales can be had again from their product.
    """
    weight_OI = weight_OI.float()
    steps = FP8_LARGEST if scheme == "fp8" else WEIGHT_STEPS
    scale_O1 = (weight_OI.abs().amax(dim=1, keepdim=True) / steps).bfloat16().float()
    scale_O1 = torch.where(scale_O1 > 0, scale_O1, torch.ones_like(scale_O1))
    # A scale that was rounded down leaves the largest value up to half a percent above the last step.
    values_OI = (weight_OI / scale_O1).clamp(-steps, steps)
    return (values_OI.to(FP8) if scheme == "fp8" else values_OI.round().to(torch.int8)), scale_O1


class QuantisedWeights:
    """Weights as they are after rounding. Implements `TensorSource`; holds no weights itself.

    Args:
        source: the weights before.
        shapes: of all of them by name.
        scheme: what they are rounded to.
        kept_layers: numbers of layers that are not rounded.
    """

    def __init__(
        self,
        source: TensorSource,
        shapes: dict[str, tuple[int, ...]],
        scheme: Scheme,
        kept_layers: Collection[int] = (),
    ) -> None:
        self._source = source
        self._shapes = shapes
        self._scheme = scheme
        self._kept_layers = frozenset(kept_layers)

    def read(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """See `TensorSource.read`."""
        if not is_quantised(name, self._kept_layers):
            return self._source.read(name, offset, shape)
        # The scale is of the whole row, whatever part of it is asked for.
        num_columns = self._shapes[name][1]
        weight_OI = self._source.read(name, (offset[0], 0), (shape[0], num_columns))
        values_OI, scale_O1 = quantised_rows(weight_OI, self._scheme)
        return (values_OI.float() * scale_O1)[:, offset[1] : offset[1] + shape[1]]


def round_inputs(
    chunks: Sequence[Any], tensor_group: dist.ProcessGroup, scheme: Scheme, kept_layers: Collection[int]
) -> Iterator[Any]:
    """Make the linear layers of Megatron's GPTModel chunks round what they are given; yields the hooks' handles."""
    if scheme == "w8a16":
        return
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            if layer.layer_number - 1 in kept_layers:
                continue
            for linear, group in (
                (layer.self_attention.linear_qkv, None),
                (layer.self_attention.linear_proj, tensor_group),
                (layer.mlp.linear_fc1, None),
                (layer.mlp.linear_fc2, tensor_group),
            ):
                yield linear.register_forward_pre_hook(partial(_round_input, scheme, group))


def rounded(values_XI: Tensor, scheme: Scheme, group: dist.ProcessGroup | None) -> Tensor:
    """The nearest INT8 or FP8 multiples of a scale a token; `group` holds the other columns of these tokens."""
    values = values_XI.float()
    largest_X1 = values.abs().amax(dim=-1, keepdim=True)
    if group is not None and group.size() > 1:
        dist.all_reduce(largest_X1, op=dist.ReduceOp.MAX, group=group)
    scale_X1 = largest_X1 / (FP8_LARGEST if scheme == "fp8" else INPUT_STEPS)
    scale_X1 = torch.where(scale_X1 > 0, scale_X1, torch.ones_like(scale_X1))
    values = values / scale_X1
    if scheme == "fp8":
        values = values.clamp_(-FP8_LARGEST, FP8_LARGEST).to(FP8).float()
    else:
        values = values.round_().clamp_(-128, 127)
    return values.mul_(scale_X1).to(values_XI.dtype)


def _round_input(
    scheme: Scheme, group: dist.ProcessGroup | None, module: Any, given: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    return rounded(given[0], scheme, group), *given[1:]
