"""Stages that take other numbers of nodes: the jobs of a run, one after another on one run directory.

`cluster.slurm.stage_nodes` names the stages that differ from `cluster.num_nodes`. Neighbours in the order that take as
many nodes share a job. A job's own configuration is that of the run with `num_nodes` its own, and the data axis, which
changes no number, following; every stage says what it takes there, so that a job knows which are not its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby

from conf.schema import RunConfig, ServiceConfig
from recipes.serving import mesh_of_service, services_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """The stages of one job."""

    num_nodes: int
    stages: tuple[str, ...]


def nodes_of(config: RunConfig, stage: str) -> int:
    """Nodes a stage takes."""
    slurm = config.cluster.slurm
    return slurm.stage_nodes.get(stage, config.cluster.num_nodes) if slurm else config.cluster.num_nodes


def is_here(config: RunConfig, stage: str) -> bool:
    """Whether a stage is for a job of as many nodes as this configuration has."""
    return nodes_of(config, stage) == config.cluster.num_nodes


def service_here(config: RunConfig) -> ServiceConfig | None:
    """The service of the teacher of a job's stages; a rule sees to it that they agree."""
    here = (service for stage, service in services_of(config).items() if is_here(config, stage))
    return next(here, None)


def num_teacher_ranks(config: RunConfig) -> int:
    """Ranks of a job that are a teacher's."""
    service = service_here(config)
    return 0 if service is None else mesh_of_service(service).world_size


def links(config: RunConfig) -> tuple[Link, ...]:
    """The jobs of a run, in order."""
    if config.cluster.slurm is None or not config.cluster.slurm.stage_nodes:
        return (Link(num_nodes=config.cluster.num_nodes, stages=config.order),)
    grouped = groupby(config.order, lambda stage: nodes_of(config, stage))
    return tuple(Link(num_nodes=num_nodes, stages=tuple(stages)) for num_nodes, stages in grouped)


def sizes(config: RunConfig) -> tuple[RunConfig, ...]:
    """The configuration once for each number of nodes that some stage takes."""
    return tuple(on_nodes(config, count) for count in dict.fromkeys(link.num_nodes for link in links(config)))


def on_nodes(config: RunConfig, num_nodes: int) -> RunConfig:
    """The configuration of a job with so many nodes."""
    cluster, mesh = config.cluster, config.engine.mesh
    if cluster.slurm is None or not cluster.slurm.stage_nodes:
        return config
    every = {**cluster.slurm.stage_nodes, **{stage: nodes_of(config, stage) for stage in config.order}}
    slurm = replace(cluster.slurm, stage_nodes=every)
    there = replace(config, cluster=replace(cluster, num_nodes=num_nodes, slurm=slurm))
    if num_nodes != cluster.num_nodes and cluster.ranks_per_node is not None:
        others = mesh.tensor * mesh.context * mesh.pipeline
        num_ranks = num_nodes * cluster.ranks_per_node - num_teacher_ranks(there)
        mesh = replace(mesh, data=max(1, num_ranks // others))
    return replace(there, engine=replace(config.engine, mesh=mesh))


def for_stage(config: RunConfig, stage: str) -> RunConfig:
    """The configuration of the job a stage runs in."""
    return on_nodes(config, nodes_of(config, stage))


def in_one_job(config: RunConfig) -> RunConfig:
    """The same with every stage on `cluster.num_nodes`."""
    slurm = config.cluster.slurm
    if slurm is None:
        return config
    return replace(config, cluster=replace(config.cluster, slurm=replace(slurm, stage_nodes={})))


def stage_of_next_job(config: RunConfig, is_done: Callable[[str], bool]) -> str | None:
    """The stage to go on with, where it takes another number of nodes than there are here; else None."""
    left = next((stage for stage in config.order if not is_done(stage)), None)
    return left if left is not None and not is_here(config, left) else None
