"""Round a model's weights (and, as it runs, the inputs of its linear layers) to INT8, and see what that costs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from conf.schema import QuantiseStage
from data.batch import Batch
from parallel.device import this_device
from parallel.divergence import largest_logits
from parallel.engine import Engine, Logits, RowScores, TensorSource, make_engine
from parallel.quantisation import QuantisedWeights, is_quantised
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
    """What of a model is in INT8.

    Attributes:
        scheme: w8a16 (weights) or w8a8 (weights and the inputs of linear layers).
        kept_layers: layers that stay as they were.
    """

    scheme: str
    kept_layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Look:
    """What a model says of the calibration text: scores of rows and, on the last pipeline rank, likeliest tokens."""

    rows: RowScores
    likeliest: list[Tensor]


def quantise(given: StageInput, stage: QuantiseStage) -> StageOutput:
    """Write the rounded model, as numbers every engine reads, and a `quantisation` record for each layer and for all.

    A layer that alone costs more than `most_cost` nats a token is left as it was.

    Raises:
        DataError: calibration text is text that models are evaluated on.
    """
    given.announce(stage.kind)
    parent = given.open_model(stage.model)
    layers = range(parent.manifest.provenance.model.num_layers)
    before = look(given, stage, parent.weights, parent, None)
    costly: list[int] = []
    for layer in layers:
        alone = Quantisation(scheme=stage.scheme, kept_layers=tuple(other for other in layers if other != layer))
        after = look(given, stage, quantised(parent, alone), parent, alone)
        cost = cost_of(before, after)
        if stage.most_cost is not None and cost.mean > stage.most_cost:
            costly.append(layer)
        record(given, stage, f"layer {layer}", cost, agreement(before, after), kept=layer in costly)
    whole = Quantisation(scheme=stage.scheme, kept_layers=tuple(costly))
    weights = quantised(parent, whole)
    after = look(given, stage, weights, parent, whole)
    record(given, stage, "all", cost_of(before, after), agreement(before, after), kept=False)
    checkpoint = save_model(
        given,
        parent.manifest.provenance.model,
        weights,
        sources=stage.calibration.mixture,
        parents=(parent_of(parent),),
    )
    if given.context.is_first:
        replace_text(quantisation_file(given.context.run, given.name), json.dumps(asdict(whole)))
    return StageOutput("finished", checkpoint)


def quantised(parent: Checkpoint, quantisation: Quantisation) -> QuantisedWeights:
    """The rounded weights of a checkpoint."""
    return QuantisedWeights(parent.weights, parent.weights.shapes(), quantisation.kept_layers)


def quantisation_file(run: RunDir, stage: str) -> Path:
    """Where a stage says what it left in INT8."""
    return run.path / "stages" / stage / "quantisation.json"


def quantisation_of(run: RunDir, stage: str) -> Quantisation | None:
    """What of a stage's model is in INT8; None where nothing is."""
    file = quantisation_file(run, stage)
    if not file.exists():
        return None
    content = json.loads(file.read_text())
    return Quantisation(scheme=content["scheme"], kept_layers=tuple(content["kept_layers"]))


def run_quantised(engine: Engine, quantisation: Quantisation | None) -> None:
    """Make an engine that has the rounded weights compute as the scheme says."""
    if quantisation is not None and quantisation.scheme == "w8a8":
        engine.round_inputs(quantisation.kept_layers)


def look(
    given: StageInput,
    stage: QuantiseStage,
    weights: TensorSource,
    parent: Checkpoint,
    quantisation: Quantisation | None,
) -> Look:
    """What the parent says with these weights."""
    mesh = mesh_of(given)
    config = replace(given.context.config.engine, recompute="none")
    model = parent.manifest.provenance.model
    engine = make_engine(model, config, None, mesh, micro_batch=stage.calibration.micro_batch)
    try:
        engine.load_weights(weights)
        run_quantised(engine, quantisation)
        batches: list[Batch] = calibration_batches(given, stage.calibration, mesh, engine.coordinate)
        return Look(engine.score(batches), engine.predict(batches, _likeliest))
    finally:
        engine.close()


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
        counts += torch.tensor([float((one == other).sum()), float(one.numel())], dtype=torch.float64)
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
