"""Train a model from fresh weights, and what every training stage shares."""

from __future__ import annotations

from conf.schema import ModelConfig, PretrainStage, TrainingConfig
from parallel.attention_kernel import attention_kernel
from parallel.engine import TensorSource, make_engine
from parallel.initial import InitialWeights
from parallel.memory_errors import StepOutOfMemoryError, naming_memory_errors
from parallel.mesh import Mesh
from recipes.fitting import advice
from recipes.stage import StageInput, StageOutput, tokenizer_identity
from train.checkpoint import Parent, Provenance
from train.loop import StageJob, TrainingLoop


def pretrain(given: StageInput, stage: PretrainStage) -> StageOutput:
    """Train from weights that depend on the seed alone, not on the layout."""
    config = given.context.config
    weights = InitialWeights(config.model, config.seed)
    return train_stage(given, stage.kind, stage.training, config.model, initial=weights, parents=())


def train_stage(
    given: StageInput,
    kind: str,
    training: TrainingConfig,
    model: ModelConfig,
    *,
    initial: TensorSource,
    parents: tuple[Parent, ...],
) -> StageOutput:
    """Train `model` from `initial` and pass on the last checkpoint.

    Raises:
        StepOutOfMemoryError: with changes that would fit.
    """
    context = given.context
    engine_config = context.config.engine
    print(f"-- stage {given.name}: attention by {attention_kernel().name}, {engine_config.precision}", flush=True)
    try:
        with naming_memory_errors("building the model and its optimizer"):
            engine = make_engine(model, engine_config, training.optim, mesh_of(given), micro_batch=training.micro_batch)
    except StepOutOfMemoryError as error:
        raise error.followed_by(advice(context.config, given.name, error.capacity_bytes)) from error
    try:
        job = StageJob(
            name=given.name,
            kind=kind,
            model=model,
            training=training,
            datasets=given.datasets,
            provenance=Provenance(
                run=context.run.name,
                recipe=context.config.name,
                stage=given.name,
                model=model,
                engine=engine_config,
                tokenizer=tokenizer_identity(given.datasets),
                data={name: given.datasets[name].identity for name in training.sources},
                parents=parents,
            ),
        )
        outcome, checkpoint = TrainingLoop(context, job, engine, initial).run()
    except StepOutOfMemoryError as error:
        raise error.followed_by(advice(context.config, given.name, error.capacity_bytes)) from error
    finally:
        engine.close()
    return StageOutput(outcome, checkpoint)


def mesh_of(given: StageInput) -> Mesh:
    """The mesh of the run."""
    mesh = given.context.config.engine.mesh
    assert mesh.data is not None, "the mesh is resolved before launch"
    return Mesh(pipeline=mesh.pipeline, data=mesh.data, context=mesh.context, tensor=mesh.tensor, expert=mesh.expert)
