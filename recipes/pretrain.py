"""Train a model from fresh weights, and what every training stage shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from conf.schema import ModelConfig, PretrainStage, TrainingConfig
from data.batch import Batch
from parallel.attention_kernel import attention_kernel
from parallel.engine import Match, Objective, TensorSource, make_engine
from parallel.initial import InitialWeights
from parallel.memory_errors import naming_memory_errors
from parallel.mesh import Mesh
from recipes.stage import StageInput, StageOutput, tokenizer_identity
from train.checkpoint import Parent, Provenance
from train.loop import StageJob, TrainingLoop


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a stage learns from.

    Attributes:
        objectives: the loss of a step's micro-batches, or one for each; None: cross-entropy of the labels.
        flops_per_token: model FLOPs a token of computing them, the student's own left out.
        match: outputs of layers it learns from besides.
    """

    objectives: Callable[[Sequence[Batch]], Objective | Sequence[Objective]] | None
    flops_per_token: float
    match: Match | None = None


FROM_LABELS = Lesson(None, 0.0)


def pretrain(given: StageInput, stage: PretrainStage) -> StageOutput:
    """Train from weights that depend on the seed alone, not on the layout."""
    config = given.context.config
    weights = InitialWeights(config.model, config.seed)
    return train_stage(given, stage.training, config.model, initial=weights, parents=())


def train_stage(
    given: StageInput,
    training: TrainingConfig,
    model: ModelConfig,
    *,
    initial: TensorSource,
    parents: tuple[Parent, ...],
    lesson: Lesson = FROM_LABELS,
) -> StageOutput:
    """Train `model` from `initial` and pass on the last checkpoint.

    Raises:
        StepOutOfMemoryError: with the part of the step.
    """
    context = given.context
    engine_config = context.config.engine
    attention = attention_kernel().name
    if context.config.data.reset_at_documents:
        dtype = torch.bfloat16 if engine_config.weight_precision == "bf16" else torch.float32
        attention = attention_kernel().name_within_documents(dtype, model.head_dim)
    print(f"-- stage {given.name}: attention by {attention}, {engine_config.precision}", flush=True)
    with naming_memory_errors("building the model and its optimizer"):
        engine = make_engine(model, engine_config, training.optim, mesh_of(given), micro_batch=training.micro_batch)
    try:
        if lesson.match is not None:
            engine.match_outputs(lesson.match)
        job = StageJob(
            name=given.name,
            kind=context.config.stages[given.name].kind,
            model=model,
            training=training,
            datasets=given.datasets,
            provenance=provenance_of(given, model, training.sources, parents),
            objectives=lesson.objectives,
            teacher_flops_per_token=lesson.flops_per_token,
            reading=given.reading,
        )
        outcome, checkpoint = TrainingLoop(context, job, engine, initial).run()
    finally:
        engine.close()
    return StageOutput(outcome, checkpoint)


def provenance_of(
    given: StageInput, model: ModelConfig, sources: Iterable[str], parents: tuple[Parent, ...]
) -> Provenance:
    """What a checkpoint of this stage says about where it comes from."""
    return Provenance(
        run=given.context.run.name,
        recipe=given.context.config.name,
        stage=given.name,
        model=model,
        engine=given.context.config.engine,
        tokenizer=tokenizer_identity(given.datasets),
        data={name: given.datasets[name].identity for name in sources},
        parents=parents,
    )


def mesh_of(given: StageInput) -> Mesh:
    """The mesh of the run."""
    mesh = given.context.config.engine.mesh
    assert mesh.data is not None, "the mesh is resolved before launch"
    return Mesh(pipeline=mesh.pipeline, data=mesh.data, context=mesh.context, tensor=mesh.tensor, expert=mesh.expert)
