"""Score models side by side on the same held-out documents, with standard errors and an n-gram baseline."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from conf import load
from conf.schema import EvaluateStage, RunConfig
from data.batch import Batch
from data.held_out import held_out_batches
from data.ngram import NGram
from data.shards import Dataset
from data.stream import stream_of_stage
from parallel.engine import make_engine
from recipes.pretrain import mesh_of
from recipes.quantise import Quantisation, is_quantised, quantisation_of, run_quantised
from recipes.rules_compression import present
from recipes.stage import StageInput, StageOutput, open_datasets
from recipes.targets import write_target
from train.checkpoint import Checkpoint
from train.loop import score_documents
from train.metrics import MetricsWriter
from train.rundir import run_of
from train.scores import DocumentScores, Estimate

Scores = dict[tuple[str, str], DocumentScores]


def evaluate(given: StageInput, stage: EvaluateStage) -> StageOutput:
    """Write an `evaluation` record for every model and source, and a `comparison` for every pair that matters."""
    given.announce(stage.kind)
    stage = without_the_missing(given.context.config, stage)
    scores: Scores = {}
    for name in stage.models:
        scores |= score_model(given, stage, name)
    if stage.ngram_order:
        # Rank 0 alone makes them, and the others wait for it outside of collectives.
        scores |= given.reading.of_all_ranks(lambda: score_baselines(given, stage) if given.context.is_first else {})
    if given.context.is_first:
        metrics = MetricsWriter(given.context.run.metrics_file)
        write_evaluations(metrics, given.name, scores)
        write_comparisons(metrics, given.name, stage, scores)
        write_targets(given, metrics, stage, scores)
    return StageOutput("finished", None)


def without_the_missing(config: RunConfig, stage: EvaluateStage) -> EvaluateStage:
    """The stage without models whose stages are left out of the order."""

    def are_present(*names: str) -> bool:
        return present(config, names) == names

    comparisons = stage.comparisons
    if comparisons is not None:
        comparisons = {model: present(config, names) for model, names in comparisons.items() if are_present(model)}
    return dataclasses.replace(
        stage,
        models=present(config, stage.models),
        ngram_models=present(config, stage.ngram_models),
        comparisons=comparisons,
        targets={name: each for name, each in stage.targets.items() if are_present(each.model, each.baseline)},
    )


def score_model(given: StageInput, stage: EvaluateStage, name: str) -> Scores:
    """Scores of one model on every source; all ranks take part."""
    context, mesh = given.context, mesh_of(given)
    checkpoint = Checkpoint.open(given.model_of(name))
    # Scoring keeps no gradients or optimizer, whatever the training stages' engine keeps.
    config = dataclasses.replace(context.config.engine, recompute="none")
    engine = make_engine(checkpoint.manifest.provenance.model, config, None, mesh, micro_batch=stage.micro_batch)
    try:
        engine.load_weights(checkpoint.weights)
        quantisation = quantisation_of(context.run, name)
        run_quantised(engine, quantisation)
        place = engine.coordinate
        texts = given.reading.of_all_ranks(lambda: held_out_text(given, stage, place.data, mesh.data))
        started = time.monotonic()
        scores = {(name, source): score_documents(engine, batches) for source, batches in texts.items()}
        seconds = time.monotonic() - started
    finally:
        engine.close()
    if context.is_first:
        MetricsWriter(context.run.metrics_file).write(
            "variant",
            stage=given.name,
            model=name,
            num_parameters=checkpoint.manifest.provenance.model.num_parameters,
            weight_bytes=weight_bytes(checkpoint, quantisation, 2 if config.precision == "bf16" else 4),
            prefill_tokens_per_second=sum(each.num_tokens for each in scores.values()) / seconds,
        )
    return scores


def held_out_text(
    given: StageInput, stage: EvaluateStage, data_rank: int = 0, data_size: int = 1
) -> dict[str, list[Batch]]:
    """A data rank's share of the documents that are scored, by source."""
    return {
        source: held_out_batches(
            given.datasets[source],
            tokens=stage.tokens,
            sequence_length=stage.sequence_length,
            micro_batch=stage.micro_batch,
            data_rank=data_rank,
            data_size=data_size,
        )
        for source in stage.sources
    }


def weight_bytes(checkpoint: Checkpoint, quantisation: Quantisation | None, itemsize: int) -> int:
    """What the weights take as they are exported: rounded matrices a byte an element and a scale a row."""
    total = 0
    for name, shape in checkpoint.weights.shapes().items():
        if quantisation is not None and is_quantised(name, quantisation.kept_layers):
            total += math.prod(shape) + itemsize * shape[0]
        else:
            total += itemsize * math.prod(shape)
    return total


def score_baselines(given: StageInput, stage: EvaluateStage) -> Scores:
    """Scores of all n-gram models that are asked for."""
    scores: Scores = {}
    for name in stage.ngram_models:
        scores |= score_baseline(given, stage, name)
    return scores


def score_baseline(given: StageInput, stage: EvaluateStage, name: str) -> Scores:
    """Scores, on the same documents, of an n-gram model that has seen what the named model saw."""
    config = given.context.config
    seen = list(up_to(seen_by(given.model_of(name), given.reading.watch), stage.ngram_tokens))
    if not seen:
        text = f"no n-gram beside {name}: its checkpoint was copied out of its run, which alone knows what it saw"
        MetricsWriter(given.context.run.metrics_file).write("message", level="warning", text=text)
        return {}
    baseline = NGram.train(seen, vocab_size=config.model.vocab_size, order=stage.ngram_order)
    scores: Scores = {}
    for source, batches in held_out_text(given, stage).items():
        rows = baseline.score(batches)
        scores[baseline_name(stage, name), source] = DocumentScores.from_rows(
            rows.sample_ids_B, rows.loss_B, rows.correct_B, rows.num_tokens_B
        )
    return scores


def baseline_name(stage: EvaluateStage, name: str) -> str:
    """How the n-gram that saw what a model saw is called."""
    return f"{stage.ngram_order}-gram of {name}"


def seen_by(
    checkpoint: Path, opened: Callable[[Iterable[Dataset]], None] = lambda datasets: None
) -> Iterator[npt.NDArray[np.int64]]:
    """Token windows that made a model: its stage's, the stages' before, then those of the run that one started from.

    Order is arithmetic, so what was seen is read again rather than recorded. Latest stage first. `opened` is told the
    datasets that are read.
    """
    run = run_of(checkpoint)
    if run is None:
        return
    config = load.read(run.config_file)
    datasets = open_datasets(run, config.data)
    opened(datasets.values())
    last = config.order.index(checkpoint.parents[1].name)
    for name in reversed(config.order[: last + 1]):
        training = getattr(config.stages[name], "training", None)
        if training is not None:
            stream = stream_of_stage(config, name, datasets)
            for step in range(training.num_steps):
                yield from stream.windows(stream.sample_ids(step))
    if config.init is not None:
        yield from seen_by(Path(config.init), opened)


def up_to(windows: Iterator[npt.NDArray[np.int64]], limit: int) -> Iterator[npt.NDArray[np.int64]]:
    """Windows until `limit` tokens have gone by."""
    for window_S in windows:
        if limit <= 0:
            return
        limit -= len(window_S) - 1
        yield window_S


def write_evaluations(metrics: MetricsWriter, name: str, scores: Scores) -> None:
    """One record for each model and source."""
    for (model, source), score in scores.items():
        loss, accuracy = score.loss(), score.accuracy()
        metrics.write(
            "evaluation",
            stage=name,
            model=model,
            source=source,
            loss=loss.mean,
            standard_error=loss.standard_error,
            accuracy=accuracy.mean,
            accuracy_standard_error=accuracy.standard_error,
            num_tokens=score.num_tokens,
            num_documents=score.num_documents,
        )


def write_comparisons(metrics: MetricsWriter, name: str, stage: EvaluateStage, scores: Scores) -> None:
    """Every model against those it is compared with, and against the n-gram that saw what it saw."""
    for source in stage.sources:
        for position, model in enumerate(stage.models):
            if stage.comparisons is None:
                baselines = stage.models[:position]
            else:
                baselines = stage.comparisons.get(model, ())
            for baseline in [*baselines, baseline_name(stage, model)]:
                if (baseline, source) not in scores:
                    continue
                gain = scores[model, source].gain_over(scores[baseline, source])
                metrics.write(
                    "comparison",
                    stage=name,
                    model=model,
                    baseline=baseline,
                    source=source,
                    gain=gain.mean,
                    standard_error=gain.standard_error,
                )


def write_targets(given: StageInput, metrics: MetricsWriter, stage: EvaluateStage, scores: Scores) -> None:
    """What was promised beside what was reached, with its error. Speed is measured when models are exported."""
    for name, target in stage.targets.items():
        if target.quantity == "speed":
            continue
        if target.quantity == "size":
            sizes = [given.open_model(model).manifest.provenance.model for model in (target.model, target.baseline)]
            value = Estimate(sizes[0].num_parameters / sizes[1].num_parameters, 0.0)
        else:
            value = scores[target.model, target.source].accuracy_over(scores[target.baseline, target.source])
        write_target(metrics, given.name, name, target, value)
