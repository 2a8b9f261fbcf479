"""From a configured engine and training stage to the planner's layout."""

from __future__ import annotations

from conf.schema import EngineConfig, TrainingConfig
from parallel.plan.layout import OURS, OURS_ON_DEEPSPEED, Layout, Sharding

SHARDING: tuple[Sharding, ...] = ("none", "zero1", "zero2", "zero3")
"""By `engine.zero_stage`."""
STACKS = {"megatron": OURS, "deepspeed": OURS_ON_DEEPSPEED}
"""By `engine.backend`."""


def layout_of(engine: EngineConfig, training: TrainingConfig, *, data: int) -> Layout:
    """How a training stage is spread, with `data` data ranks."""
    mesh = engine.mesh
    return Layout(
        tensor=mesh.tensor,
        context=mesh.context,
        pipeline=mesh.pipeline,
        virtual_pipeline=mesh.virtual_pipeline,
        data=data,
        expert=mesh.expert,
        micro_batch=training.micro_batch,
        global_batch=training.global_batch,
        sequence=training.sequence_length,
        precision="fp8" if engine.precision == "fp8_rowwise" else engine.precision,
        recompute="mlp" if engine.recompute == "selective" else engine.recompute,
        sharding=SHARDING[engine.zero_stage],
        sequence_parallel=engine.sequence_parallel,
        stack=STACKS[engine.backend],
        offload=engine.offload_optimizer,
        offload_activations=engine.offload_activations,
    )
