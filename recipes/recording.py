"""What a teacher's logits are of, and where a recording of them is. No model is looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from conf.schema import DistillationConfig, DistillStage, LogitsStage, RecoverStage, RunConfig, TrainingConfig
from data.logits import FORMAT_VERSION, LogitsManifest, StoredAs
from data.shards import Dataset
from data.stream import mixtures_of


def learner_of(config: RunConfig, stage: str) -> tuple[TrainingConfig, DistillationConfig]:
    """How a distilling stage trains and learns, in the order or not: another run may be the one that learns."""
    learner = config.stages[stage]
    assert isinstance(learner, RecoverStage | DistillStage), "recipes/rules_distillation.py"
    return learner.training, learner.distillation


def about_text(config: RunConfig, stage: str) -> dict[str, Any]:
    """What decides which samples a distilling stage sees and what is kept of its teacher; of the configuration."""
    training, distillation = learner_of(config, stage)
    return {
        "stage": stage,
        "seed": config.seed,
        "sequence_length": training.sequence_length,
        "global_batch": training.global_batch,
        "mixtures": [[first, dict(mixture)] for first, mixture in mixtures_of(training)],
        "shuffle": asdict(config.data.shuffle),
        "vocab_size": config.model.vocab_size,
        "temperature": distillation.temperature,
        "top_k": distillation.top_k,
    }


def about_data(datasets: Mapping[str, Dataset], sources: tuple[str, ...]) -> dict[str, Any]:
    """What does so of the data."""
    used = {name: datasets[name] for name in sources}
    return {
        "tokenizer": next(iter(used.values())).tokenizer_sha256,
        "data": {name: dataset.identity for name, dataset in used.items()},
    }


def manifest_of(config: RunConfig, stage: str, stored_as: StoredAs, about: dict[str, Any]) -> LogitsManifest:
    """The manifest of what a distilling stage's teacher says, without its parts."""
    training, distillation = learner_of(config, stage)
    return LogitsManifest(
        format_version=FORMAT_VERSION,
        about=about,
        vocab_size=config.model.vocab_size,
        tokens=training.sequence_length,
        top_k=distillation.top_k,
        stored_as=stored_as,
        num_samples=training.num_steps * training.global_batch,
    )


def location_of(config: RunConfig, logits: str, *, run_dir: str) -> str:
    """Folder or URI of a recording: of a stage of this run, or the one that is named."""
    stage = config.stages.get(logits)
    if not isinstance(stage, LogitsStage):
        return logits
    return f"{run_dir}/logits/{logits}" if stage.location is None else stage.location
