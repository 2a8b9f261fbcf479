"""How many bytes each axis sends over which links in a step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from parallel.plan.hardware import Gpu
from parallel.plan.layout import Layout
from parallel.plan.memory import layers_of_stage, stage_parameters
from parallel.plan.shapes import Shape, Teacher

Link = Literal["node", "network"]
FORWARD_SHARE = {"tensor": 4 / 10, "context": 1 / 3, "pipeline": 1 / 2}
"""By axis, of the bytes of forward and backward pass together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AxisTraffic:
    """What a GPU sends along an axis."""

    axis: str
    group: int
    """Ranks that talk to each other."""
    stride: int
    """Distance of neighbours in the order of ranks."""
    link: Link
    """The slowest one on the way round."""
    step_bytes: float
    """That a GPU sends in a step."""
    what: str


def traffic(shape: Shape, layout: Layout, gpu: Gpu, teacher: Teacher | None = None) -> tuple[AxisTraffic, ...]:
    """Of all axes that have more than one rank, nearest neighbours first; of a middle pipeline stage."""
    if teacher is not None:
        own, taught = traffic(shape, layout, gpu), traffic(teacher.shape, replace(layout, recompute="none"), gpu)
        return tuple(
            replace(each, step_bytes=each.step_bytes + FORWARD_SHARE.get(each.axis, 0.0) * other.step_bytes)
            for each, other in zip(own, taught, strict=True)
        )
    found = []
    layers = layers_of_stage(shape, layout, layout.pipeline // 2)
    rounds = layout.micro_batches
    again = {"none": 0, "selective": 0, "mlp": 0.5, "full": 1}[layout.recompute]
    activations = layout.tokens * shape.hidden * layout.element_bytes
    stride = 1

    def add(axis: str, group: int, num_bytes: float, what: str) -> None:
        nonlocal stride
        if group > 1:
            link: Link = "node" if stride * group <= min(gpu.gpus_per_node, layout.num_gpus) else "network"
            found.append(AxisTraffic(axis=axis, group=group, stride=stride, link=link, step_bytes=num_bytes, what=what))
        stride *= group

    ring = (layout.tensor - 1) / layout.tensor
    exchanges = 4 * (1 + again) + 6
    add("tensor", layout.tensor, rounds * layers * exchanges * activations * ring, "activations, in every layer")
    keys = 2 * shape.kv_width / layout.tensor * layout.element_bytes * layout.tokens
    add("context", layout.context, rounds * layers * (3 + again) * keys * (layout.context - 1), "keys and values")
    local = sum(stage_parameters(shape, layout, layout.pipeline // 2))
    group = layout.data * layout.context
    add(
        "data",
        layout.data,
        local * (layout.stack.gradient_bytes + layout.element_bytes) * (group - 1) / group,
        "gradients in fp32, updated weights",
    )
    add(
        "pipeline",
        layout.pipeline,
        2 * rounds * layout.virtual_pipeline * activations / layout.sequence_split,
        "activations and their gradients",
    )
    return tuple(found)
