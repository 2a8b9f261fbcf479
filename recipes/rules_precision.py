"""Rules about the precision of matrix products: which GPUs have fp8, and which sizes its kernels take."""

from __future__ import annotations

import re
from collections.abc import Iterator

from conf.errors import Problem
from conf.schema import ModelConfig, RunConfig
from recipes.machine import Machine
from recipes.rules_layout import nearest_multiples, trainings_of
from recipes.rules_place import uses_gpu
from recipes.stage_models import given_shapes

FP8_GPUS = re.compile(r"\b(G?H\d{2,3}|GB?\d{3}|B\d{3}|L4|L40S?|Ada|RTX [45]0\d\d|RTX PRO \d+)\b")
"""Compute capability 8.9 and later, by NVIDIA's names."""


def has_fp8(gpu: str) -> bool:
    """Whether a GPU of this name multiplies in fp8.

    >>> has_fp8("NVIDIA H100 80GB HBM3"), has_fp8("NVIDIA A100-SXM4-80GB")
    (True, False)
    """
    return FP8_GPUS.search(gpu) is not None


def fp8_is_there(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Only Ada, Hopper and later multiply in fp8."""
    if not config.engine.precision.startswith("fp8"):
        return
    remedy = "Set engine.precision=bf16."
    if config.cluster.kind != "local":
        if not has_fp8(config.budget.gpu):
            yield Problem(
                "engine.precision",
                f"is {config.engine.precision}, and {config.budget.gpu} (budget.gpu) has no fp8 units. {remedy}",
            )
    elif not uses_gpu(config, machine):
        yield Problem(
            "engine.precision",
            f"is {config.engine.precision}, and ranks run on CPU cores, which have no fp8 units. {remedy}",
        )
    else:
        without = sorted({gpu for gpu in machine.gpus if not has_fp8(gpu)})
        if without:
            yield Problem(
                "engine.precision",
                f"is {config.engine.precision}, and {', '.join(without)} has no fp8 units (Ada, Hopper and later do). "
                f"{remedy}",
            )


def fp8_products_have_whole_tiles(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Every side of an fp8 matrix product is a multiple of 16."""
    if not config.engine.precision.startswith("fp8"):
        return
    models = {"model": config.model}
    models |= {path: shape.applied_to(config.model) for path, shape in given_shapes(config).items()}
    sides = {side: size for path, model in models.items() for side, size in _sides(path, model, config).items()}
    for name, training in trainings_of(config).items():
        tokens = training.micro_batch * training.sequence_length // config.engine.mesh.context
        sides[f"stages.{name}.training.micro_batch x sequence_length"] = tokens
    multiple = config.engine.product_multiple
    for side, size in sides.items():
        if size % multiple:
            yield Problem(
                "engine.precision",
                f"is {config.engine.precision}, whose products take multiples of {multiple}, and {side} is {size} "
                f"on a rank. Nearest: {nearest_multiples(size, multiple)}.",
            )


def _sides(path: str, model: ModelConfig, config: RunConfig) -> dict[str, int]:
    """Of the matrices of a layer, on a rank."""
    tensor, heads = config.engine.mesh.tensor, model.num_attention_heads + 2 * model.num_kv_heads
    return {
        f"{path}.hidden_size": model.hidden_size,
        f"{path}.ffn_hidden_size": model.ffn_hidden_size // tensor,
        f"{path}.head_dim x heads": model.head_dim * model.num_attention_heads // tensor,
        f"{path}.head_dim x (heads + 2 x key-value heads)": model.head_dim * heads // tensor,
    }


RULES = (fp8_is_there, fp8_products_have_whole_tiles)
