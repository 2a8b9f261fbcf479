"""Score models side by side on the same held-out documents, with standard errors and an n-gram baseline."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from conf import load
from conf.schema import EvaluateStage, RunConfig
from data.held_out import held_out_batches
from data.ngram import NGram
from data.stream import Stream
from parallel.engine import make_engine
from recipes.pretrain import mesh_of
from recipes.stage import StageInput, StageOutput, open_datasets
from train.checkpoint import Checkpoint
from train.loop import score_documents
from train.metrics import MetricsWriter
from train.rundir import RunDir
from train.scores import DocumentScores

Scores = dict[tuple[str, str], DocumentScores]


def evaluate(given: StageInput, stage: EvaluateStage) -> StageOutput:
    """Write an `evaluation` record for every model and source, and a `comparison` for every pair that matters."""
    given.announce(stage.kind)
    scores: Scores = {}
    for name in stage.models:
        scores |= score_model(given, stage, name)
    if given.context.is_first:
        if stage.ngram_order:
            scores |= score_baseline(given, stage)
        metrics = MetricsWriter(given.context.run.metrics_file)
        write_evaluations(metrics, given.name, scores)
        write_comparisons(metrics, given.name, stage, scores)
    return StageOutput("finished", None)


def score_model(given: StageInput, stage: EvaluateStage, name: str) -> Scores:
    """Scores of one model on every source; all ranks take part."""
    context, mesh = given.context, mesh_of(given)
    checkpoint = Checkpoint.open(given.model_of(name))
    # Scoring keeps no gradients or optimizer, whatever the training stages' engine keeps.
    config = dataclasses.replace(context.config.engine, recompute="none")
    engine = make_engine(checkpoint.manifest.provenance.model, config, None, mesh, micro_batch=stage.micro_batch)
    try:
        engine.load_weights(checkpoint.weights)
        return {
            (name, source): score_documents(
                engine,
                held_out_batches(
                    given.datasets[source],
                    tokens=stage.tokens,
                    sequence_length=stage.sequence_length,
                    micro_batch=stage.micro_batch,
                    data_rank=engine.coordinate.data,
                    data_size=mesh.data,
                ),
            )
            for source in stage.sources
        }
    finally:
        engine.close()


def score_baseline(given: StageInput, stage: EvaluateStage) -> Scores:
    """Scores of an n-gram model that has seen what the models saw, on the same documents."""
    vocab_size = given.context.config.model.vocab_size
    seen = seen_tokens(given.context.run, given.context.config, limit=stage.ngram_tokens)
    baseline = NGram.train(seen, order=stage.ngram_order, vocab_size=vocab_size)
    scores: Scores = {}
    for source in stage.sources:
        batches = held_out_batches(
            given.datasets[source],
            tokens=stage.tokens,
            sequence_length=stage.sequence_length,
            micro_batch=stage.micro_batch,
            data_rank=0,
            data_size=1,
        )
        rows = baseline.score(batches)
        scores[f"{stage.ngram_order}-gram", source] = DocumentScores.from_rows(
            rows.sample_ids_B, rows.loss_B, rows.correct_B, rows.num_tokens_B
        )
    return scores


def seen_tokens(run: RunDir, config: RunConfig, *, limit: int) -> Iterator[npt.NDArray[np.int64]]:
    """Token windows the training stages of a run saw, latest stage first, then those of the run it started from.

    Order is arithmetic, so what was seen is read again rather than recorded. Ends after about `limit` tokens.
    """
    datasets = open_datasets(run)
    left = limit
    for name in reversed(config.order):
        training = getattr(config.stages[name], "training", None)
        if training is None:
            continue
        stream = Stream(
            {source: datasets[source] for source in training.mixture},
            mixture=training.mixture,
            seed=config.seed,
            sequence_length=training.sequence_length,
            global_batch=training.global_batch,
            micro_batch=training.global_batch,
        )
        for step in range(training.num_steps):
            for batch in stream.batches(step, 0, 1):
                for tokens_S, labels_S in zip(batch.tokens_BS, batch.labels_BS, strict=True):
                    if left <= 0:
                        return
                    left -= len(labels_S)
                    yield np.append(tokens_S, labels_S[-1])
    if config.init is not None:
        # RUN/stages/NAME/checkpoints/step-N: a checkpoint that was copied elsewhere has no run around it.
        origin = RunDir(Path(config.init).parents[3])
        if origin.config_file.exists() and origin.datasets_file.exists():
            yield from seen_tokens(origin, load.read(origin.config_file), limit=left)


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
    """Every model against each model named before it, and against the n-gram baseline."""
    for source in stage.sources:
        baselines = [model for model, scored in scores if scored == source and model not in stage.models]
        for position, model in enumerate(stage.models):
            for baseline in [*stage.models[:position], *baselines]:
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
