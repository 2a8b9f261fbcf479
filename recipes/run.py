"""A recipe on one rank: its stages in order, from checkpoint to checkpoint; those already done are passed over."""

from __future__ import annotations

import time
from pathlib import Path

import torch.distributed as dist

from conf.schema import (
    ControlStage,
    DistillStage,
    EvaluateStage,
    ExportStage,
    LogitsStage,
    PretrainStage,
    PruneStage,
    QuantiseStage,
    RecoverStage,
    SpecialiseStage,
)
from data.shards import Dataset
from parallel.groups import default_store
from parallel.memory_errors import StepOutOfMemoryError
from recipes.chain import is_here
from recipes.control import train_control
from recipes.distill import distill
from recipes.evaluate import evaluate
from recipes.export import export
from recipes.fitting import advice
from recipes.logits import record_logits
from recipes.pretrain import pretrain
from recipes.prune import prune
from recipes.quantise import quantise
from recipes.recover import recover
from recipes.rules_layout import trainings_of
from recipes.specialise import specialise
from recipes.stage import StageInput, StageOutput, open_datasets
from recipes.stage_models import passes_on
from train.data_gate import Reading, StoppedWaitingError, data_gate
from train.metrics import MetricsWriter
from train.rundir import StageResult
from train.worker import RankContext, RankOutcome


def run_stages(context: RankContext) -> RankOutcome:
    """Run every stage that is not done yet; `stopped` as soon as one was asked to stop, or is for another job."""
    datasets = open_datasets(context.run, context.config.data)
    incoming = Path(context.config.init) if context.config.init is not None else None
    for name in context.config.order:
        result = context.run.result(name)
        # Rank 0 writes the result of the stage after this; nobody may look for it before all have looked for this one.
        dist.barrier()
        if result is None and not is_here(context.config, name):
            return "stopped"
        if result is None:
            started = time.monotonic()
            reading = reading_of(context, name, datasets)
            try:
                output = run_stage(
                    StageInput(context=context, name=name, incoming=incoming, datasets=datasets, reading=reading)
                )
            except StoppedWaitingError:
                return "stopped"
            if output.outcome == "stopped":
                return "stopped"
            checkpoint = None if output.checkpoint is None else str(output.checkpoint)
            goes_on = passes_on(context.config.stages[name])
            result = StageResult(checkpoint=checkpoint, seconds=time.monotonic() - started, passes_on=goes_on)
            dist.barrier()
            if context.is_first:
                context.run.write_result(name, result)
                MetricsWriter(context.run.metrics_file).write("stage_ended", stage=name, seconds=result.seconds)
            dist.barrier()
        if result.checkpoint is not None and result.passes_on:
            incoming = Path(result.checkpoint)
    return "finished"


def reading_of(context: RankContext, name: str, datasets: dict[str, Dataset]) -> Reading:
    """How a stage reads what is not read step by step."""

    def say(text: str) -> None:
        if context.is_first:
            MetricsWriter(context.run.metrics_file).write("message", level="info", text=text)

    all_of_them = list(datasets.values())
    gate = data_gate(default_store(), f"{name}/reading", all_of_them, place=context.place, say=say)
    return Reading(gate, name=name, datasets=all_of_them, asked_to_stop=context.run.stop_file.exists)


def run_stage(given: StageInput) -> StageOutput:
    """Run one stage by its kind.

    Raises:
        StepOutOfMemoryError: of a stage that trains, its teacher included, with changes that would fit.
    """
    try:
        return _stage_of_its_kind(given)
    except StepOutOfMemoryError as error:
        config = given.context.config
        if given.name not in trainings_of(config):
            raise
        raise error.followed_by(advice(config, given.name, error.capacity_bytes)) from error


def _stage_of_its_kind(given: StageInput) -> StageOutput:
    match given.context.config.stages[given.name]:
        case PretrainStage() as stage:
            output = pretrain(given, stage)
        case SpecialiseStage() as stage:
            output = specialise(given, stage)
        case PruneStage() as stage:
            output = prune(given, stage)
        case RecoverStage() as stage:
            output = recover(given, stage)
        case DistillStage() as stage:
            output = distill(given, stage)
        case LogitsStage() as stage:
            output = record_logits(given, stage)
        case QuantiseStage() as stage:
            output = quantise(given, stage)
        case ControlStage() as stage:
            output = train_control(given, stage)
        case EvaluateStage() as stage:
            output = evaluate(given, stage)
        case ExportStage() as stage:
            output = export(given, stage)
    return output
