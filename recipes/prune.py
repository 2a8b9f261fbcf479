"""Cut a smaller model out of a larger one: measure what matters, try shapes, keep the best."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from conf.errors import CheckpointError
from conf.schema import CalibrationConfig, EngineConfig, ModelConfig, PruneStage, SearchConfig, ShapeConfig
from data.batch import Batch
from parallel.device import this_device
from parallel.engine import TensorSource, make_engine
from parallel.importance import Importance
from parallel.pruning import PrunedWeights, most_important, retained
from parallel.shapes import shapes_that_hold, size_of
from parallel.weight_importance import magnitude_importance, random_importance
from recipes.calibration import calibration_batches, search_batches
from recipes.pretrain import mesh_of
from recipes.save import save_model
from recipes.stage import StageInput, StageOutput, parent_of
from recipes.stage_models import grid_of
from train.checkpoint import Checkpoint
from train.metrics import MetricsWriter
from train.scores import Estimate, ratio

# A forward pass is not as much shorter as a model is smaller: for a target of time, smaller shapes are tried as well.
FURTHER_CUTS_FOR_LATENCY = (0.0, 0.05, 0.1, 0.15)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What scoring a shape showed.

    Attributes:
        shape: of the pruned model.
        loss: before any recovery, nats a token over rows of the search text.
        seconds: that scoring took, on rank 0.
    """

    shape: ModelConfig
    loss: Estimate
    seconds: float


def prune(given: StageInput, stage: PruneStage) -> StageOutput:
    """Write the pruned model, and a `candidate` record for every shape that was tried.

    Raises:
        CheckpointError: no shape holds the target, or the shape given is no smaller one of this model.
        DataError: calibration text is text that models are evaluated on.
        FloatingPointError: importance is not finite.
    """
    given.announce(stage.kind)
    parent = given.open_model(stage.model)
    importance = importance_of(given, parent, stage.importance, stage.calibration)
    if stage.shape is not None:
        shape = with_shape(parent.manifest.provenance.model, stage.shape)
    elif stage.shape_of is not None:
        shape = given.open_model(stage.shape_of).manifest.provenance.model
    else:
        shape = Search(given, stage, parent, importance).best()
    return StageOutput("finished", save_pruned(given, parent, importance, shape, stage.calibration))


def importance_of(given: StageInput, parent: Checkpoint, kind: str, calibration: CalibrationConfig) -> Importance:
    """How much the parts of a model matter; the same on every rank.

    Raises:
        DataError: calibration text is text that models are evaluated on.
        FloatingPointError: scores are not finite.
    """
    model, mesh = parent.manifest.provenance.model, mesh_of(given)
    if kind == "random":
        return random_importance(model, given.context.config.seed)
    if kind == "magnitude":
        return magnitude_importance(parent.weights, model)
    engine = make_engine(model, scoring(given), None, mesh, micro_batch=calibration.micro_batch)
    try:
        engine.load_weights(parent.weights)
        return engine.observe(calibration_batches(given, calibration, mesh, engine.coordinate))
    finally:
        engine.close()


def save_pruned(
    given: StageInput, parent: Checkpoint, importance: Importance, shape: ModelConfig, calibration: CalibrationConfig
) -> Path:
    """Write the parent's most important parts as a model of a smaller shape; returns its checkpoint."""
    weights = pruned_weights(parent, importance, shape)
    return save_model(given, shape, weights, sources=calibration.mixture, parents=(parent_of(parent),))


def pruned_weights(parent: Checkpoint, importance: Importance, shape: ModelConfig) -> PrunedWeights:
    """The weights of a smaller shape, read from the parent's checkpoint."""
    model = parent.manifest.provenance.model
    return PrunedWeights(parent.weights, model, shape, most_important(importance, model, shape))


def with_shape(parent: ModelConfig, shape: ShapeConfig) -> ModelConfig:
    """The parent with other sizes.

    Raises:
        CheckpointError: a size is larger than the parent's.
    """
    larger = [f"{name}={size}" for name, size in asdict(shape).items() if size and size > getattr(parent, name)]
    if larger:
        raise CheckpointError(f"a pruned model is smaller than its parent in everything; {', '.join(larger)} is not.")
    return shape.applied_to(parent)


def scoring(given: StageInput) -> EngineConfig:
    """The engine without what only training needs."""
    return replace(given.context.config.engine, recompute="none")


class Search:
    """The shapes of one stage, tried in the order of the importance they keep.

    Which shapes are tried, and in which order, follows from the configuration; only how many the time allows does not.
    """

    def __init__(self, given: StageInput, stage: PruneStage, parent: Checkpoint, importance: Importance) -> None:
        self.given = given
        self.stage = stage
        self.config: SearchConfig = stage.search
        self.parent = parent
        self.model = parent.manifest.provenance.model
        self.importance = importance
        self.mesh = mesh_of(given)

    def best(self) -> ModelConfig:
        """The shape with the lowest loss among those that hold the target.

        Raises:
            CheckpointError: none holds it.
        """
        shapes = self.shapes()
        if not shapes:
            raise CheckpointError(self.nothing_holds("no shape of the grid"))
        if len(shapes) == 1 and self.config.measure != "latency":
            return shapes[0]
        whole = self.tried(self.model, self.parent.weights)
        self.record(whole, kept=1.0)
        limit = (1.0 - self.config.removed) * whole.seconds if self.config.measure == "latency" else float("inf")
        found: list[Trial] = []
        for shape in self.within_time(shapes[: self.config.candidates]):
            weights = pruned_weights(self.parent, self.importance, shape)
            trial = self.tried(shape, weights)
            self.record(trial, kept=self.kept(shape))
            found += [trial] if trial.seconds <= limit else []
        if not found:
            raise CheckpointError(self.nothing_holds(f"none of the {self.config.candidates} shapes tried"))
        return min(found, key=lambda trial: trial.loss.mean).shape

    def shapes(self) -> list[ModelConfig]:
        """Those that hold the target (for latency, that may), most promising first."""
        config = self.config
        further = FURTHER_CUTS_FOR_LATENCY if config.measure == "latency" else (0.0,)
        shapes = {
            shape: None
            for more in further
            if config.removed + more < 1
            for shape in shapes_that_hold(
                self.model,
                cut=config.cut,
                measure=config.measure,
                removed=config.removed + more,
                grid=grid_of(self.given.context.config, config),
            )
        }
        return most_promising_first({shape: self.kept(shape) for shape in shapes})

    def kept(self, shape: ModelConfig) -> float:
        """Share of the importance a shape keeps."""
        return retained(self.importance, most_important(self.importance, self.model, shape))

    def within_time(self, shapes: Sequence[ModelConfig]) -> Iterator[ModelConfig]:
        """Shapes until the time is up by rank 0's clock; at least one."""
        started = time.monotonic()
        for position, shape in enumerate(shapes):
            if position and agreed(time.monotonic() - started) > self.config.seconds:
                if self.given.context.is_first:
                    text = f"the search stopped after {position} of {len(shapes)} shapes ({self.config.seconds:g} s)"
                    MetricsWriter(self.given.context.run.metrics_file).write("message", level="warning", text=text)
                return
            yield shape

    def tried(self, shape: ModelConfig, weights: TensorSource) -> Trial:
        """Score a shape on the search text."""
        micro_batch = self.stage.calibration.micro_batch
        engine = make_engine(shape, scoring(self.given), None, self.mesh, micro_batch=micro_batch)
        try:
            engine.load_weights(weights)
            batches: list[Batch] = search_batches(
                self.given, self.stage.calibration, self.config.tokens, self.mesh, engine.coordinate
            )
            if self.config.measure == "latency":
                engine.score(batches)  # the first pass also allocates
            started = time.monotonic()
            rows = engine.score(batches)
            seconds = agreed(time.monotonic() - started)
        finally:
            engine.close()
        return Trial(shape=shape, loss=ratio(rows.loss_B.numpy(), rows.num_tokens_B.numpy()), seconds=seconds)

    def record(self, trial: Trial, *, kept: float) -> None:
        """Write a trial down."""
        shape = trial.shape
        if self.given.context.is_first:
            MetricsWriter(self.given.context.run.metrics_file).write(
                "candidate",
                stage=self.given.name,
                num_layers=shape.num_layers,
                hidden_size=shape.hidden_size,
                ffn_hidden_size=shape.ffn_hidden_size,
                num_attention_heads=shape.num_attention_heads,
                num_kv_heads=shape.num_kv_heads,
                num_experts=shape.num_experts,
                num_parameters=shape.num_parameters,
                num_active_parameters=shape.num_active_parameters,
                size_ratio=size_of(shape, self.config.measure) / size_of(self.model, self.config.measure),
                importance_kept=kept,
                loss=trial.loss.mean,
                standard_error=trial.loss.standard_error,
                seconds=trial.seconds,
            )

    def nothing_holds(self, what: str) -> str:
        """Why the search came to nothing."""
        config, measure = self.config, self.config.measure
        return (
            f"{what} has {config.removed:.0%} less {measure} than {self.parent.path} (cut {config.cut}). Lower "
            f"stages.{self.given.name}.search.removed, set search.cut=mixed, smaller hidden_multiple and ffn_multiple, "
            "or cut in several prune and recover stages."
        )


def most_promising_first(kept: Mapping[ModelConfig, float]) -> list[ModelConfig]:
    """Of each width, depth and number of experts the shape that keeps most, then the second of each, and so on.

    What is kept tells shapes of one width apart well; channels, neurons and experts it weighs against each other badly.
    """
    seen: Counter[tuple[int, int, int]] = Counter()
    ranked: list[tuple[int, float, ModelConfig]] = []
    for shape in sorted(kept, key=lambda shape: -kept[shape]):
        width = (shape.hidden_size, shape.num_layers, shape.num_experts)
        ranked.append((seen[width], -kept[shape], shape))
        seen[width] += 1
    return [shape for _, _, shape in sorted(ranked, key=lambda entry: entry[:2])]


def agreed(seconds: float) -> float:
    """Rank 0's number, on every rank."""
    shared = torch.tensor([seconds], dtype=torch.float64, device=this_device())
    dist.broadcast(shared, src=0)
    return float(shared)
