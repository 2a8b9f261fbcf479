"""Teachers on ranks of their own, before any of them exists: which stages have one, and how it is spread."""

from __future__ import annotations

from dataclasses import replace

from conf.schema import DistillStage, EngineConfig, ModelConfig, RecoverStage, RunConfig, ServiceConfig
from parallel.mesh import Mesh


def services_of(config: RunConfig) -> dict[str, ServiceConfig]:
    """Stage -> the service of its teacher, of the stages of the order that have one."""
    stages = {name: config.stages[name] for name in config.order if name in config.stages}
    return {
        name: stage.distillation.service
        for name, stage in stages.items()
        if isinstance(stage, RecoverStage | DistillStage) and stage.distillation.service is not None
    }


def mesh_of_service(service: ServiceConfig) -> Mesh:
    """The teacher's mesh."""
    mesh, data = service.mesh, service.mesh.data or 1
    # A rule of its own refuses expert groups that do not fit; the other rules look at the rest.
    expert = mesh.expert if data * mesh.context % mesh.expert == 0 else 1
    return Mesh(pipeline=mesh.pipeline, data=data, context=mesh.context, tensor=mesh.tensor, expert=expert)


def engine_of_service(config: RunConfig, service: ServiceConfig) -> EngineConfig:
    """The teacher's engine: the run's, without what only a backward pass or an optimizer has."""
    return replace(
        config.engine,
        backend=service.backend or config.engine.backend,
        precision=service.precision or config.engine.precision,
        mesh=replace(service.mesh, data=service.mesh.data or 1),
        sequence_parallel=service.sequence_parallel,
        zero_stage=1,  # both backends have it in every precision; there is nothing to split
        offload_optimizer="none",
        offload_directory=None,
        recompute="none",
        offload_activations=False,
    )


def as_teacher(config: RunConfig, stage: str, service: ServiceConfig, teacher: ModelConfig) -> RunConfig:
    """The configuration a stage's teacher computes by: for rules that ask whether a layout is possible."""
    return replace(config, engine=engine_of_service(config, service), model=teacher, order=(stage,))
