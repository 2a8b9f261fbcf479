"""From a configured engine and training stage to the planner's layout."""

from __future__ import annotations

from conf.schema import EngineConfig, TrainingConfig
from parallel.plan.layout import OURS, Layout


def layout_of(engine: EngineConfig, training: TrainingConfig, *, data: int) -> Layout:
    """How a training stage is spread, with `data` data ranks."""
    mesh = engine.mesh
    return Layout(
        tensor=mesh.tensor,
        context=mesh.context,
        pipeline=mesh.pipeline,
        virtual_pipeline=mesh.virtual_pipeline,
        data=data,
        micro_batch=training.micro_batch,
        global_batch=training.global_batch,
        sequence=training.sequence_length,
        precision=engine.precision,
        recompute="mlp" if engine.recompute == "selective" else engine.recompute,
        sharding="zero1" if engine.distributed_optimizer else "none",
        sequence_parallel=engine.sequence_parallel,
        stack=OURS,
    )
