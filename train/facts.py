"""What a run is in a few words, the same on the screen and in the report."""

from __future__ import annotations

from collections.abc import Iterator

from conf.schema import DistillStage, MeshConfig, ModelConfig, RecoverStage, RunConfig, TrainingConfig, TrainingStage
from train.quantities import count


def facts(config: RunConfig, world_size: int) -> dict[str, str]:
    """Label -> what it is in this run; a second line after a line break says more."""
    return dict(_facts(config, world_size))


def _facts(config: RunConfig, world_size: int) -> Iterator[tuple[str, str]]:
    if config.scale == "full":
        yield "ranks", f"{world_size} x {config.budget.gpu}"
    else:
        where = "this machine" if config.cluster.kind == "local" else f"cluster {config.cluster.name}"
        yield "ranks", f"{world_size} on {where}"
    yield "model", f"{_size(config.model)}\n{_shape(config.model)}"
    yield "stages", ", ".join(config.order)
    for name in config.order:
        stage = config.stages[name]
        if isinstance(stage, TrainingStage):
            yield name, _amount(stage.training)
    yield "mesh", _mesh(config.engine.mesh, world_size)
    for name in config.order:
        stage = config.stages[name]
        if isinstance(stage, RecoverStage | DistillStage) and stage.distillation.service is not None:
            mesh = stage.distillation.service.mesh
            yield f"{name}'s teacher", f"{_mesh(mesh, 1)}, on ranks of its own"
    yield "precision", config.engine.precision
    if config.scale == "full":
        yield "budget", f"{config.budget.days:g} days at {config.budget.power_mw:g} MW"
    else:
        yield "budget", "none"


def _size(model: ModelConfig) -> str:
    text = f"{count(model.num_parameters)} parameters"
    if model.experts is None:
        return text
    chosen = f"{model.experts.num_experts_per_token} of {model.experts.num_experts} experts"
    return f"{text}, {count(model.num_active_parameters)} a token ({chosen})"


def _shape(model: ModelConfig) -> str:
    heads = f"{model.num_attention_heads}/{model.num_kv_heads} heads"
    return f"{model.num_layers} layers x {model.hidden_size:,}, {heads}, vocabulary {count(model.vocab_size)}"


def _amount(training: TrainingConfig) -> str:
    batch = f"{training.global_batch:,} x {training.sequence_length:,}"
    return f"{count(training.tokens)} tokens\n{training.num_steps:,} steps of {batch}"


def _mesh(mesh: MeshConfig, world_size: int) -> str:
    data = mesh.data or max(world_size // (mesh.tensor * mesh.context * mesh.pipeline), 1)
    axes = {"tensor": mesh.tensor, "context": mesh.context, "data": data, "pipeline": mesh.pipeline}
    text = " x ".join(f"{axis} {size}" for axis, size in axes.items())
    if mesh.expert > 1:
        text += f", expert {mesh.expert}"
    return f"{text}\n{mesh.virtual_pipeline} layer chunks a pipeline rank" if mesh.virtual_pipeline > 1 else text
