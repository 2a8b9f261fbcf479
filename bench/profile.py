"""Trace and table of a recipe's step on one rank: `python -m bench.profile recipe=foundation [OVERRIDE...]`.

The model, engine, batch and precision are those of the recipe's first training stage (of its rehearsal, or with
`scale=full` at full size); axes are set to 1, and tokens are random. Writes `profile.json` for Perfetto.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench.kernels import kernel_table
from conf import load
from conf.errors import UserError
from conf.schema import MeshConfig
from data.batch import Batch
from parallel import groups
from parallel.engine import make_engine
from parallel.initial import InitialWeights
from parallel.loss import CrossEntropy
from parallel.mesh import Mesh
from recipes.rules_layout import trainings_of

ONE_RANK = MeshConfig(tensor=1, context=1, pipeline=1, virtual_pipeline=1, data=1, expert=1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Profile and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__)
    parser.add_argument("override", nargs="+")
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--trace", type=Path, default=Path("profile.json"))
    given = parser.parse_args(arguments)
    try:
        config = load.compose(given.override)
    except UserError as error:
        parser.exit(2, f"{error}\n")
    training = next(iter(trainings_of(config).values()))
    groups.open_world(groups.host_store(), rank=0, world_size=1)
    groups.enter_mesh(Mesh())
    settings = replace(config.engine, mesh=ONE_RANK, sequence_parallel=False)
    engine = make_engine(config.model, settings, training.optim, Mesh(), micro_batch=training.micro_batch)
    engine.load_weights(InitialWeights(config.model, config.seed))
    size = (given.micro_batches, training.micro_batch, training.sequence_length + 1)
    rows = np.random.default_rng(0).integers(config.model.vocab_size, size=size)
    batches = [
        Batch(
            tokens_BS=row[:, :-1],
            labels_BS=row[:, 1:],
            loss_mask_BS=np.ones(row[:, 1:].shape, dtype=np.float32),
            position_ids_BS=np.tile(np.arange(training.sequence_length), (training.micro_batch, 1)),
            sample_ids_B=np.arange(training.micro_batch),
        )
        for row in rows
    ]
    objective = CrossEntropy(z_loss=training.z_loss)

    def step() -> float:
        return engine.step(batches, objective, learning_rate=training.optim.learning_rate).loss

    print(kernel_table(step, trace=given.trace))
    print(f"trace {given.trace}")
    engine.close()
    groups.shut_down()


if __name__ == "__main__":
    main()
