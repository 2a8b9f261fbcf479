"""Which experts to drop: `python -m bench.experts --output DIR --steps 600 --seed 1`.

Trains the rehearsal of `model=mixtral_8x7b` on one rank, on its recipe's text, and scores each expert from activations
on calibration text by the ways there are in the literature. Then drops experts by each, equally many a layer, and
writes by how much the loss of other text rises, before any recovery: with calibration and loss on all domains, and on
the first alone. A second table is of neurons, all experts being kept. A model that is there already is not trained
again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.settings import engine_of
from conf import load
from conf.schema import ModelConfig, TrainingStage
from data.samples import StreamSpec
from data.shards import Dataset
from data.stream import Stream
from parallel import groups
from parallel.engine import Engine, make_engine
from parallel.importance import Importance
from parallel.initial import InitialWeights
from parallel.loss import CrossEntropy
from parallel.mesh import Mesh
from parallel.pruning import PrunedWeights, most_important
from parallel.weight_importance import magnitude_importance, random_importance
from recipes.driver import prepare_sources
from train.scores import Estimate, ratio

MESH = Mesh(pipeline=1, data=1, context=1, tensor=1)
ROWS, MICRO_BATCH = 16, 8
CALIBRATION_ROWS, SCORED_ROWS = 128, 128
TRAINED, CALIBRATED, SCORED = 0, 1, 2
"""Seeds of the order of text. Scored text may have been trained on, a few per cent of it, as a search's may."""
RANDOM_DRAWS = 3
KEPT = {"experts": (6, 4), "neurons": (144, 96)}
"""Of 8 experts a layer, of 192 neurons an expert."""


class Sums:
    """What activations say of the experts of each layer: sums over the tokens that were sent to them.

    `tokens` counts them; `weight` is of the router's weights, `norm` of the lengths of what the expert puts out, `out`
    of those of what it adds to the residual stream (the product of both); `_squared` of their squares.
    """

    def __init__(self, model: ModelConfig) -> None:
        names = ("tokens", "weight", "norm", "norm_squared", "out", "out_squared")
        self.of = {name: torch.zeros(model.num_layers, model.num_experts).double() for name in names}

    @contextmanager
    def watching(self, engine: Any) -> Iterator[None]:
        """While open, what passes through the experts of an engine of one rank is added up."""
        layers = [layer for chunk in engine._chunks for layer in chunk.decoder.layers]
        handles = [
            layer.mlp.experts.register_forward_hook(partial(self._add, layer.layer_number - 1)) for layer in layers
        ]
        yield
        for handle in handles:
            handle.remove()

    def _add(self, layer: int, module: Any, given: Sequence[Tensor], output: tuple[Tensor, None]) -> None:
        _, counts_E, weights_N = given
        out_N = torch.linalg.vector_norm(output[0], dim=-1)
        norm_N = out_N / weights_N
        parts = [weights_N, norm_N, norm_N.square(), out_N, out_N.square()]
        self.of["tokens"][layer] += counts_E
        for name, values_N in zip(list(self.of)[1:], parts, strict=True):
            sums = [part.sum() for part in values_N.split(counts_E.tolist())]
            self.of[name][layer] += torch.stack(sums)

    def criteria(self) -> dict[str, Tensor]:
        """Scores of the experts, by how they are called."""
        of, tokens = self.of, self.of["tokens"].clamp_min(1)
        return {
            "tokens sent": of["tokens"],
            "weights, summed": of["weight"],
            "weight x norm, mean (REAP)": of["out"] / tokens,
            "weight x norm, summed": of["out"],
            "weight x norm, L2": of["out_squared"].sqrt(),
            "norm, mean (MAN)": of["norm"] / tokens,
            "norm, mean square (MSAN)": of["norm_squared"] / tokens,
        }


def main() -> None:
    """Train, or take what is there, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the trained model and of prepared text")
    parser.add_argument("--steps", type=int, default=600, help="of 2,048 tokens")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    overrides = ["recipe=foundation", "model=mixtral_8x7b", f"runs_dir={given.output}", f"seed={given.seed}"]
    config = load.compose(overrides)
    datasets = {name: Dataset.open(path) for name, path in prepare_sources(config).items()}
    groups.open_world(dist.HashStore(), rank=0, world_size=1)
    groups.enter_mesh(MESH)
    model, stage = config.model, config.stages["pretrain"]
    assert isinstance(stage, TrainingStage)
    file = given.output / f"experts-{given.steps}-{given.seed}.safetensors"
    if not file.exists():
        train(model, stage, datasets, given.steps, given.seed, file)
    weights = InMemory(load_file(file))
    print(f"\n{given.steps} steps, seed {given.seed}; rise of the loss, nats a token, +- standard error over rows")
    first = next(iter(datasets))
    mixtures = {"all": dict.fromkeys(datasets, 1.0), first: {first: 1.0}}
    subjects = {name: Subject(model, weights, datasets, each, given.seed) for name, each in mixtures.items()}
    for part, cut in {"experts": Subject.without_experts, "neurons": Subject.narrower}.items():
        sizes = KEPT[part]
        print(f"\n| {part} chosen by |", " | ".join(f"{size} stay, {text}" for size in sizes for text in subjects), "|")
        print("| --- |" + " ---: |" * len(sizes) * len(subjects))
        columns = [cut(subject, size) for size in sizes for subject in subjects.values()]
        for name in columns[0]:
            print("|", " | ".join([name, *(column[name] for column in columns)]), "|", flush=True)
    groups.shut_down()


def text(
    datasets: Mapping[str, Dataset], mixture: Mapping[str, float], length: int, seed: int, rows: int = ROWS
) -> Stream:
    """Rows of training text in an order of their own."""
    spec = StreamSpec(
        mixtures=[(0, dict(mixture))],
        seed=seed,
        sequence_length=length,
        global_batch=rows,
        micro_batch=MICRO_BATCH,
        reset_at_documents=False,
    )
    return Stream(datasets, spec)


def train(model: ModelConfig, stage: Any, datasets: Mapping[str, Dataset], steps: int, seed: int, file: Path) -> None:
    """Train from fresh weights and write them."""
    optim = stage.training.optim
    engine = make_engine(model, engine_of(), optim, MESH, micro_batch=MICRO_BATCH)
    engine.load_weights(InitialWeights(model, seed))
    stream = text(datasets, dict.fromkeys(datasets, 1.0), model.max_sequence_length, 10 * seed + TRAINED)
    for step in range(steps):
        rate = optim.learning_rate * min(1.0, (step + 1) / 50, (steps - step) / (0.3 * steps))
        result = engine.step(stream.batches(step, 0, 1), CrossEntropy(), learning_rate=rate)
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step}: loss {result.loss:.3f}, balance {result.metrics['router_balance']:.3f}", flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({piece.name: piece.tensor.clone().view(piece.global_shape) for piece in whole(engine)}, file)
    engine.close()


def whole(engine: Engine) -> list[Any]:
    """The weights of an engine of one rank, a piece a tensor."""
    parts: dict[str, list[Any]] = {}
    for piece in engine.weights():
        parts.setdefault(piece.name, []).append(piece)
    return [
        replace(
            pieces[0], tensor=torch.cat([piece.tensor.flatten() for piece in sorted(pieces, key=lambda p: p.offset)])
        )
        for pieces in parts.values()
    ]


class InMemory:
    """Weights in memory. Implements `TensorSource`."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def read(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """See `TensorSource.read`."""
        return self._tensors[name][tuple(slice(at, at + size) for at, size in zip(offset, shape, strict=True))]


class Subject:
    """A trained model, what activations on some text say of it, and other text of the same kind to score it on."""

    def __init__(
        self,
        model: ModelConfig,
        weights: InMemory,
        datasets: Mapping[str, Dataset],
        mixture: Mapping[str, float],
        seed: int,
    ) -> None:
        length = model.max_sequence_length
        calibration = text(datasets, mixture, length, 10 * seed + CALIBRATED, CALIBRATION_ROWS).batches(0, 0, 1)
        self.scored = text(datasets, mixture, length, 10 * seed + SCORED, SCORED_ROWS).batches(0, 0, 1)
        self.model, self.weights, self.sums = model, weights, Sums(model)
        engine = make_engine(model, engine_of(), None, MESH, micro_batch=MICRO_BATCH)
        engine.load_weights(weights)
        with self.sums.watching(engine):
            self.importance = engine.observe(calibration)
        self.before = engine.score(self.scored)
        engine.close()

    def without_experts(self, kept: int) -> dict[str, str]:
        """Criterion -> by how much the loss rises with so many experts kept."""
        shape = self.model.with_experts(kept)
        found = {name: self.rise(shape, experts_LE=scores_LE) for name, scores_LE in self.sums.criteria().items()}
        magnitude = magnitude_importance(self.weights, self.model).experts_LE
        drawn = [random_importance(self.model, draw).experts_LE for draw in range(RANDOM_DRAWS)]
        found["magnitude of weights"] = self.rise(shape, experts_LE=magnitude)
        return told(found, [self.rise(shape, experts_LE=scores_LE) for scores_LE in drawn])

    def narrower(self, kept: int) -> dict[str, str]:
        """The same with all experts, and so many neurons of each."""
        shape = replace(self.model, ffn_hidden_size=kept)
        magnitude = magnitude_importance(self.weights, self.model).ffn_LEF
        drawn = [random_importance(self.model, draw).ffn_LEF for draw in range(RANDOM_DRAWS)]
        found = {"activations": self.rise(shape), "magnitude of weights": self.rise(shape, ffn_LEF=magnitude)}
        return told(found, [self.rise(shape, ffn_LEF=scores_LEF) for scores_LEF in drawn])

    def rise(self, shape: ModelConfig, **scores: Tensor) -> Estimate:
        """Of the loss, nats a token, with a smaller shape whose parts are chosen by activations but for `scores`."""
        importance = Importance(**(self.importance.tensors() | scores))
        pruned = PrunedWeights(self.weights, self.model, shape, most_important(importance, self.model, shape))
        engine = make_engine(shape, engine_of(), None, MESH, micro_batch=MICRO_BATCH)
        engine.load_weights(pruned)
        after = engine.score(self.scored)
        engine.close()
        return ratio((after.loss_B - self.before.loss_B).numpy(), self.before.num_tokens_B.numpy())


def told(found: Mapping[str, Estimate], drawn: Sequence[Estimate]) -> dict[str, str]:
    """In words."""
    means = [each.mean for each in drawn]
    random = f"{sum(means) / len(means):.3f} ({min(means):.3f} to {max(means):.3f})"
    words = {name: f"{each.mean:.3f} +- {each.standard_error:.3f}" for name, each in found.items()}
    return words | {f"random, mean of {len(means)}": random}


if __name__ == "__main__":
    main()
