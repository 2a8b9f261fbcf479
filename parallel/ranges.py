"""How far the inputs of a layer's matrices reach, channel by channel, on calibration text.

Shape suffixes: L layers, D hidden channels, F feed-forward neurons, X any of them.
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
class Channels:
    """A number for every channel that goes into a layer's matrices; float32, on the CPU, the same on every rank.

    Attributes:
        attention_LD: into the projections of queries, keys and values.
        mlp_LD: into the gate and up projections.
        down_LF: into the down projection.
    """

    attention_LD: Tensor
    mlp_LD: Tensor
    down_LF: Tensor

    @classmethod
    def filled(cls, model: ModelConfig, value: float, device: torch.device | None = None) -> Channels:
        """All of one value."""
        widths = (model.hidden_size, model.hidden_size, model.ffn_hidden_size)
        return cls(*(torch.full((model.num_layers, width), value, device=device) for width in widths))

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Names and numbers."""
        return ((field.name, getattr(self, field.name)) for field in fields(self))


class RangeObserver:
    """Keeps the largest absolute value of every channel that passes through the chunks of one rank."""

    def __init__(self, model: ModelConfig, device: torch.device, *, tensor_rank: int) -> None:
        self._largest = Channels.filled(model, 0.0, device)
        self._tensor_rank = tensor_rank

    @contextmanager
    def watching(self, chunks: Sequence[Any]) -> Iterator[None]:
        """While open, forward passes of Megatron's GPTModel chunks are watched."""
        largest, handles = self._largest, []
        for chunk in chunks:
            for layer in chunk.decoder.layers:
                number = layer.layer_number - 1
                for norm, kept_LD in (
                    (layer.input_layernorm, largest.attention_LD),
                    (layer.pre_mlp_layernorm, largest.mlp_LD),
                ):
                    handles.append(norm.register_forward_hook(partial(_on_output, kept_LD[number])))
                handles.append(layer.mlp.linear_fc2.register_forward_pre_hook(partial(self._on_neurons, number)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _on_neurons(self, number: int, module: Any, given: tuple[Tensor, ...]) -> None:
        width = given[0].size(-1)  # this tensor rank's neurons
        _keep_largest(self._largest.down_LF[number].narrow(0, self._tensor_rank * width, width), given[0])

    def ranges(self) -> Channels:
        """The largest over all ranks, whatever their layout; every rank takes part.

        Raises:
            FloatingPointError: names the layers in which an activation is not finite.
        """
        for name, values_LX in self._largest.items():
            # Whether a maximum over ranks keeps NaN is up to the backend; infinity it keeps.
            values_LX.nan_to_num_(nan=torch.inf, posinf=torch.inf)
            dist.all_reduce(values_LX, op=dist.ReduceOp.MAX)
            wrong = (~values_LX.isfinite()).any(dim=1).nonzero().flatten().tolist()
            if wrong:
                raise FloatingPointError(
                    f"inputs of matrices ({name.rpartition('_')[0]}) are not finite in layers {wrong}: activations "
                    "overflow. Quantise a checkpoint whose loss is finite."
                )
        return Channels(*(values_LX.cpu() for _, values_LX in self._largest.items()))


def _on_output(kept_D: Tensor, module: Any, given: Any, output: Tensor) -> None:
    _keep_largest(kept_D, output)


def _keep_largest(kept_X: Tensor, values: Tensor) -> None:
    # `maximum` hands NaN on, so a value that is not finite is seen in the end.
    torch.maximum(kept_X, values.detach().abs().flatten(0, -2).amax(dim=0).float(), out=kept_X)
