"""Write a model that took no optimizer step as a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist

from conf.schema import EngineConfig, ModelConfig
from parallel.engine import TensorSource, make_engine
from recipes.pretrain import mesh_of, provenance_of
from recipes.stage import StageInput
from train.checkpoint import Parent, checkpoint_name
from train.saver import Saver


def save_model(
    given: StageInput,
    model: ModelConfig,
    weights: TensorSource,
    *,
    sources: Iterable[str],
    parents: tuple[Parent, ...],
    engine_config: EngineConfig | None = None,
) -> Path:
    """Spread the model over the mesh and let every rank write what it holds; nothing is gathered.

    Args:
        given: the stage.
        model: its shape.
        weights: where its weights are read from.
        sources: data it was made with.
        parents: checkpoints it was made from.
        engine_config: whose precision it is saved in; None: the run's.
    """
    place, directory = given.context.place, given.context.run.checkpoints(given.name)
    saver = Saver(directory, rank=place.rank, world_size=place.world_size, keep=1)
    dist.barrier()
    engine = make_engine(model, engine_config or given.context.config.engine, None, mesh_of(given), micro_batch=1)
    try:
        engine.load_weights(weights)
        saver.save(
            0,
            weights=engine.weights(),
            resume=(),
            provenance=provenance_of(given, model, sources, parents),
            samples=0,
            tokens=0,
        )
        saver.wait()
    finally:
        engine.close()
    return directory / checkpoint_name(0)
