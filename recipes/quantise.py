"""Round a model's weights, and the inputs of its linear layers as it runs, to INT8 or FP8; see what that costs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from conf.schema import ModelConfig, QuantiseStage, Scheme
from data.batch import Batch
from parallel.device import this_device
from parallel.divergence import largest_logits
from parallel.engine import Engine, Logits, RowScores, TensorSource, make_engine
from parallel.quantisation import QuantisedWeights, is_quantised
from parallel.smoothing import SmoothedWeights, smoothing_factors
from parallel.weight_names import logical_shapes
from recipes.calibration import calibration_batches
from recipes.pretrain import mesh_of
from recipes.save import save_model
from recipes.stage import StageInput, StageOutput, parent_of
from train.checkpoint import Checkpoint
from train.metrics import MetricsWriter
from train.rundir import RunDir, replace_text
from train.scores import Estimate, ratio


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantisation:
    """What of a model is rounded, and to what.

    Attributes:
        scheme: see `Scheme`.
        kept_layers: layers that stay as they were.
        smoothing: how much of what outliers make difficult went to the weights; None: nothing.
    """

    scheme: Scheme
    kept_layers: tuple[int, ...] = ()
    smoothing: float | None = None


@dataclass(frozen=True, slots=True)
class Look:
    """What a model says of the calibration text: scores of rows and, on the last pipeline rank, likeliest tokens."""

    rows: RowScores
    likeliest: list[Tensor]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that is rounded in several ways, which one engine holds in turn, and the text that is looked at."""

    engine: Engine
    model: ModelConfig
    weights: TensorSource
    batches: Sequence[Batch]

    def look(self, quantisation: Quantisation | None) -> Look:
        """What it says with this rounding; None: as it is."""
        if quantisation is None:
            self.engine.load_weights(self.weights)
        else:
            self.engine.load_weights(quantised(self.weights, self.model, quantisation))
            self.engine.round_inputs(quantisation.scheme, quantisation.kept_layers)
        return Look(self.engine.score(self.batches), self.engine.predict(self.batches, _likeliest))


def quantise(given: StageInput, stage: QuantiseStage) -> StageOutput:
    """Write the rounded model, as numbers every engine reads, and a `quantisation` record for each layer and for all.

    A layer that alone costs more than `most_cost` nats a token is left as it was.

    Raises:
        DataError: calibration text is text that models are evaluated on.
        FloatingPointError: an activation is not finite.
    """
    given.announce(stage.kind)
    parent = given.open_model(stage.model)
    with subject_of(given, stage, parent) as subject:
        layers = range(subject.model.num_layers)
        before = subject.look(None)
        costly: list[int] = []
        for layer in layers:
            others = tuple(other for other in layers if other != layer)
            after = subject.look(Quantisation(scheme=stage.scheme, kept_layers=others))
            cost = cost_of(before, after)
            if stage.most_cost is not None and cost.mean > stage.most_cost:
                costly.append(layer)
            record(given, stage, f"layer {layer}", cost, agreement(before, after), kept=layer in costly)
        whole = Quantisation(scheme=stage.scheme, kept_layers=tuple(costly), smoothing=stage.smoothing)
        after = subject.look(whole)
        record(given, stage, "all", cost_of(before, after), agreement(before, after), kept=False)
    checkpoint = save_model(
        given,
        subject.model,
        quantised(subject.weights, subject.model, whole),
        sources=stage.calibration.mixture,
        parents=(parent_of(parent),),
        # A product of value and scale has more digits than bf16; from float32 an export has both again.
        engine_config=replace(given.context.config.engine, precision="fp32"),
    )
    if given.context.is_first:
        replace_text(quantisation_file(given.context.run, given.name), json.dumps(asdict(whole)))
    return StageOutput("finished", checkpoint)


@contextmanager
def subject_of(given: StageInput, stage: QuantiseStage, parent: Checkpoint) -> Iterator[Subject]:
    """The model, smoothed where that is asked for, in an engine."""
    mesh, model = mesh_of(given), parent.manifest.provenance.model
    # Compiled layers would keep the rounding they were first called with.
    config = replace(given.context.config.engine, recompute="none", compile=False)
    engine = make_engine(model, config, None, mesh, micro_batch=stage.calibration.micro_batch)
    try:
        weights: TensorSource = parent.weights
        if stage.smoothing is not None:
            engine.load_weights(parent.weights)
            seen = calibration_batches(given, stage.calibration, mesh, engine.coordinate, use="smoothing")
            factors = smoothing_factors(engine.input_ranges(seen), parent.weights, model, stage.smoothing)
            weights = SmoothedWeights(parent.weights, factors)
        batches = calibration_batches(given, stage.calibration, mesh, engine.coordinate)
        yield Subject(engine, model, weights, batches)
    finally:
        engine.close()


def quantised(weights: TensorSource, model: ModelConfig, quantisation: Quantisation) -> QuantisedWeights:
    """The weights after rounding."""
    return QuantisedWeights(weights, logical_shapes(model), quantisation.scheme, quantisation.kept_layers)


def quantisation_file(run: RunDir, stage: str) -> Path:
    """Where a stage says what it rounded."""
    return run.path / "stages" / stage / "quantisation.json"


def quantisation_of(run: RunDir, stage: str) -> Quantisation | None:
    """What of a stage's model is rounded; None where nothing is."""
    file = quantisation_file(run, stage)
    if not file.exists():
        return None
    content = json.loads(file.read_text())
    return Quantisation(
        scheme=content["scheme"], kept_layers=tuple(content["kept_layers"]), smoothing=content.get("smoothing")
    )


def run_quantised(engine: Engine, quantisation: Quantisation | None) -> None:
    """Make an engine that has the rounded weights compute as the scheme says."""
    if quantisation is not None:
        engine.round_inputs(quantisation.scheme, quantisation.kept_layers)


def _likeliest(logits: Logits) -> Tensor:
    return largest_logits(logits.at(slice(None)), 1, logits.group)[1]


def cost_of(before: Look, after: Look) -> Estimate:
    """Nats a token by which the loss rose, with its error over rows."""
    return ratio((after.rows.loss_B - before.rows.loss_B).numpy(), before.rows.num_tokens_B.numpy())


def agreement(before: Look, after: Look) -> float:
    """Share of tokens whose likeliest successor is the same; on every rank."""
    counts = torch.zeros(2, dtype=torch.float64, device=this_device())
    # Tensor ranks hold the same tokens, and so count alike: their number cancels.
    for one, other in zip(before.likeliest, after.likeliest, strict=True):
        counts[0] += (one == other).sum()
        counts[1] += one.numel()
    dist.all_reduce(counts)
    return float(counts[0] / counts[1])


def record(given: StageInput, stage: QuantiseStage, part: str, cost: Estimate, agreement: float, *, kept: bool) -> None:
    """Write down what rounding a part costs."""
    if given.context.is_first:
        MetricsWriter(given.context.run.metrics_file).write(
            "quantisation",
            stage=given.name,
            scheme=stage.scheme,
            part=part,
            cost=cost.mean,
            standard_error=cost.standard_error,
            agreement=agreement,
            kept=kept,
        )


__all__ = ["Quantisation", "is_quantised", "quantisation_of", "quantise", "run_quantised"]
