"""Layouts that tests/distributed/test_layouts.py compares, by what is asked of them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from tiny import Layout

ZERO = partial(Layout, backend="deepspeed")

FP32 = {
    "tensor": Layout(tensor=2),
    "sequence": Layout(tensor=2, sequence_parallel=True),
    "pipeline": Layout(pipeline=2),
    "interleaved": Layout(pipeline=2, virtual_pipeline=2),
    "context": Layout(context=2),
    "data": Layout(data=2),
    "data-overlap": Layout(data=2, overlap=True),
    "data-sharded": Layout(data=2, zero_stage=1, overlap=True),
    "tensor x pipeline x data": Layout(
        tensor=2, pipeline=2, data=2, sequence_parallel=True, zero_stage=1, overlap=True
    ),
    "deepspeed data": ZERO(data=2),
    "deepspeed data-1": ZERO(data=2, zero_stage=1),
    "deepspeed data-2": ZERO(data=2, zero_stage=2, overlap=True),
    "deepspeed data-3": ZERO(data=2, zero_stage=3, overlap=True),
    "deepspeed sequence": ZERO(tensor=2, sequence_parallel=True, zero_stage=1),
    "deepspeed context": ZERO(context=2, zero_stage=2),
    "deepspeed pipeline": ZERO(pipeline=2, zero_stage=1),
}
# Fewer steps: what is wrong with a combination shows at once.
COMBINED = {
    "tensor x context x data": Layout(tensor=2, context=2, data=2, sequence_parallel=True, zero_stage=1, overlap=True),
    "pipeline x context x data": Layout(pipeline=2, context=2, data=2, zero_stage=1),
    "deepspeed tensor x context x data-3": ZERO(
        tensor=2, context=2, data=2, sequence_parallel=True, zero_stage=3, recompute="full", offload_activations=True
    ),
    "deepspeed tensor x pipeline x data-1": ZERO(
        tensor=2, pipeline=2, data=2, sequence_parallel=True, zero_stage=1, recompute="selective"
    ),
    "deepspeed pipeline x context x data-1": ZERO(
        pipeline=2, context=2, data=2, zero_stage=1, offload_activations=True
    ),
    "deepspeed pipeline 4": ZERO(pipeline=4, recompute="full"),
    "deepspeed tensor x data-2": ZERO(tensor=2, data=2, sequence_parallel=True, zero_stage=2),
    "deepspeed offloaded-1": ZERO(data=2, zero_stage=1, offload_optimizer="cpu"),
    "deepspeed offloaded-2": ZERO(tensor=2, data=2, zero_stage=2, offload_optimizer="cpu"),
    "deepspeed offloaded-3": ZERO(data=2, zero_stage=3, offload_optimizer="cpu"),
    "context-sharded": Layout(context=2, zero_stage=1),
    "context x tensor": Layout(context=2, tensor=2, sequence_parallel=True),
    "context x pipeline": Layout(context=2, pipeline=2),
    "pipeline 4": Layout(pipeline=4, recompute="full"),
    "tensor x interleaved x context": Layout(
        tensor=2, pipeline=2, virtual_pipeline=2, context=2, recompute="selective", offload_activations=True
    ),
}
BF16 = {
    "tensor": Layout(tensor=2, sequence_parallel=True, precision="bf16"),
    "pipeline": Layout(pipeline=2, precision="bf16"),
    "context": Layout(context=2, precision="bf16"),
    "data-sharded": Layout(data=2, zero_stage=1, overlap=True, precision="bf16"),
    "tensor x pipeline x data": replace(FP32["tensor x pipeline x data"], precision="bf16"),
}
FEW_BF16 = {
    "deepspeed data-1": ZERO(data=2, zero_stage=1, precision="bf16"),
    "deepspeed data-2": ZERO(data=2, zero_stage=2, precision="bf16"),
    "deepspeed data-3": ZERO(data=2, zero_stage=3, precision="bf16"),
    "deepspeed pipeline": ZERO(pipeline=2, zero_stage=1, precision="bf16"),
}
TIED_FP32 = {
    "tensor": Layout(tensor=2),
    "pipeline": Layout(pipeline=2),
    "interleaved-sharded": Layout(pipeline=2, virtual_pipeline=2, data=2, zero_stage=1, overlap=True),
    "deepspeed data-3": ZERO(data=2, zero_stage=3),
    "deepspeed pipeline x data-1": ZERO(pipeline=2, data=2, zero_stage=1),
}
# Rows of several documents that do not see each other.
PACKED = {
    "sequence": Layout(tensor=2, sequence_parallel=True),
    "pipeline": Layout(pipeline=2),
    "context": Layout(context=2),
    "data-sharded": Layout(data=2, zero_stage=1, overlap=True),
    "tensor x interleaved x context": Layout(
        tensor=2, pipeline=2, virtual_pipeline=2, context=2, sequence_parallel=True, recompute="full"
    ),
    "deepspeed data-3": ZERO(data=2, zero_stage=3, recompute="full"),
    "deepspeed pipeline 4": ZERO(pipeline=4, recompute="selective"),
}
# Runs that are stopped every five steps and go on with half the ranks, and with another engine.
SHRINKING = {
    "fp32": (
        FP32["tensor x pipeline x data"],
        ZERO(pipeline=2, data=2, zero_stage=1),
        Layout(tensor=2, zero_stage=1),
        ZERO(),
    ),
    "fp32 of deepspeed": (
        ZERO(tensor=2, data=2, zero_stage=3),
        Layout(pipeline=2, virtual_pipeline=2, zero_stage=1),
        ZERO(zero_stage=2),
    ),
    "bf16": (
        ZERO(pipeline=2, data=2, zero_stage=1, precision="bf16"),
        Layout(data=2, zero_stage=1, precision="bf16"),
        ZERO(zero_stage=3, precision="bf16"),
    ),
}
RESUMED = {
    "sharded bf16": Layout(data=2, zero_stage=1, overlap=True, precision="bf16"),
    "tensor bf16": Layout(tensor=2, precision="bf16"),
    "pipeline fp32": Layout(pipeline=2, data=2, zero_stage=1),
    "deepspeed pipeline bf16": ZERO(pipeline=2, zero_stage=1, precision="bf16"),
    "deepspeed offloaded-2 fp32": ZERO(data=2, zero_stage=2, offload_optimizer="cpu"),
    "deepspeed data-3 bf16": ZERO(data=2, zero_stage=3, precision="bf16"),
}
# What a step that is refused leaves behind differs by optimizer.
REFUSING = {
    "sharded": Layout(tensor=2, data=2, zero_stage=1),
    "deepspeed data": ZERO(data=2),
    "deepspeed pipeline x data-1": ZERO(pipeline=2, data=2, zero_stage=1),
    "deepspeed data-2": ZERO(data=2, zero_stage=2),
    "deepspeed data-3": ZERO(data=2, zero_stage=3),
    "deepspeed offloaded-3": ZERO(data=2, zero_stage=3, offload_optimizer="cpu"),
}
# What begins in host memory goes on from a file.
ON_DISK = {
    "1 fp32": ZERO(data=2, zero_stage=1, offload_optimizer="cpu"),
    "2 bf16": ZERO(tensor=2, zero_stage=2, precision="bf16", offload_optimizer="cpu"),
    "3 bf16": ZERO(data=2, zero_stage=3, precision="bf16", offload_optimizer="cpu"),
}
TWO_ENGINES = {
    "tensor x pipeline": Layout(tensor=2, pipeline=2),
    "deepspeed pipeline": ZERO(pipeline=2, zero_stage=1),
    "deepspeed data-3": ZERO(data=2, zero_stage=3),
}
