"""Compiling the layers of a model: what lies between matrix products becomes few kernels.

A layer is the unit, because all layers then share one compiled graph, because activation recomputation and Megatron's
schedules stay outside of it, and because it was faster than the whole model on one H100 (542 against 488 TFLOP/s).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer


def compile_layers(chunks: Iterable[Any]) -> None:
    """Compile the transformer layers of GPTModels at their first call; names of parameters do not change."""
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            if isinstance(layer.mlp, MoELayer):
                # How many tokens go to an expert is known only when they do.
                layer.mlp.forward = torch.compiler.disable(layer.mlp.forward)  # type: ignore[no-untyped-call]
            layer.forward = torch.compile(layer.forward)


def gather_whole_layers(model: Any) -> None:
    """Let Megatron's wrapper wait for the weights of a layer before the layer, not before each module within it.

    Where it gathers updated weights in the background, it hooks every module; hooks within a layer would be in the
    middle of the compiled graph.
    """
    handles = model.remove_forward_pre_hook_handles
    if not handles:
        return
    wait = model._make_forward_pre_hook()

    def wait_for_layer(layer: Any, *_: object) -> None:
        for module in layer.modules():
            wait(module)

    for layer in model.module.decoder.layers:
        for module in layer.modules():
            handles.pop(module).remove()
        handles[layer] = layer.register_forward_pre_hook(wait_for_layer)
