"""Everything about a run that can be known to be wrong before anything is launched.

A rule is a small function `(config, machine) -> Iterator[Problem]`; all of them are asked, and what they find is raised
at once. They live in `rules_layout.py` (model, batch and axes), `rules_engine.py` (what a backend offers),
`rules_offload.py` (the disk of optimizer state), `rules_experts.py` (mixtures of experts), `rules_precision.py` (fp8),
`rules_stages.py` (stages and what they refer to), `rules_compression.py` (pruning and distillation),
`rules_distillation.py` (hidden states, logits written down), `rules_service.py` (teachers on ranks of their own),
`rules_place.py` (this machine, its disks and the cluster),
`rules_data.py` (storage, tiers, shuffling) and `rules_slurm.py` (what is asked of Slurm). Fields on their own are
checked when they are decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import gcd

from conf.errors import ConfigError, Problem
from conf.schema import RunConfig
from recipes import (
    chain,
    rules_compression,
    rules_data,
    rules_distillation,
    rules_engine,
    rules_experts,
    rules_layout,
    rules_offload,
    rules_place,
    rules_precision,
    rules_service,
    rules_slurm,
    rules_stages,
)
from recipes.machine import Machine
from recipes.rules_layout import mesh_of
from recipes.rules_place import CPU_RANK_BYTES, uses_gpu

Rule = Callable[[RunConfig, Machine], Iterator[Problem]]
RULES: tuple[Rule, ...] = (
    *rules_stages.RULES,
    *rules_layout.RULES,
    *rules_engine.RULES,
    *rules_offload.RULES,
    *rules_experts.RULES,
    *rules_precision.RULES,
    *rules_compression.RULES,
    *rules_distillation.RULES,
    *rules_service.RULES,
    *rules_place.RULES,
    *rules_data.RULES,
    *rules_slurm.RULES,
)
WARNINGS: tuple[Rule, ...] = (
    *rules_stages.WARNINGS,
    *rules_layout.WARNINGS,
    *rules_offload.WARNINGS,
    *rules_experts.WARNINGS,
    *rules_compression.WARNINGS,
    *rules_distillation.WARNINGS,
    *rules_place.WARNINGS,
    *rules_data.WARNINGS,
    *rules_slurm.WARNINGS,
)


def check(config: RunConfig, machine: Machine) -> None:
    """Ask every rule.

    Raises:
        ConfigError: with all problems found.
    """
    problems = list(_asked(RULES, config, machine))
    if problems:
        raise ConfigError(problems)


def warnings(config: RunConfig, machine: Machine) -> list[Problem]:
    """What is allowed and probably not meant."""
    return list(_asked(WARNINGS, config, machine))


def _asked(rules: Sequence[Rule], config: RunConfig, machine: Machine) -> dict[Problem, None]:
    """What the rules find; of stages that take other numbers of nodes, each on its own."""
    found: dict[Problem, None] = {}
    for at in chain.sizes(resolve(config, machine)):
        elsewhere = tuple(f"stages.{stage}." for stage in at.order if not chain.is_here(at, stage))
        problems = (problem for rule in rules for problem in rule(at, machine))
        found |= dict.fromkeys(problem for problem in problems if not problem.path.startswith(elsewhere))
    return found


def resolve(config: RunConfig, machine: Machine) -> RunConfig:
    """Fill in `engine.mesh.data` and `cluster.ranks_per_node` where they are null; resolving twice changes nothing.

    On this machine, data takes as many ranks as there are GPUs (else cores, and memory for them) and the batches can be
    shared by; a mesh that is asked for may have more ranks than cores. On a cluster, data takes every rank there is. A
    teacher's ranks are left to it.
    """
    mesh, cluster = config.engine.mesh, config.cluster
    is_local = cluster.kind == "local"
    if cluster.ranks_per_node is not None:
        num_ranks = cluster.ranks_per_node * cluster.num_nodes
    elif not is_local:
        num_ranks = 1  # a rule asks for ranks_per_node
    elif uses_gpu(config, machine):
        num_ranks = len(machine.gpus) or 1
    else:
        num_ranks = min(machine.cores, machine.memory_bytes // CPU_RANK_BYTES)
    others = mesh.tensor * mesh.context * mesh.pipeline
    teachers = chain.num_teacher_ranks(config)
    # Expert groups are parts of the data x context ranks.
    least = mesh.expert // gcd(mesh.expert, mesh.context)
    data = mesh.data or _data_ranks(config, max(1, (num_ranks - teachers) // others), least, whole=not is_local)
    ranks_per_node = cluster.ranks_per_node
    if ranks_per_node is None and is_local:
        ranks_per_node = -(-(others * data + teachers) // cluster.num_nodes)
    return replace(
        config,
        engine=replace(config.engine, mesh=replace(mesh, data=data)),
        cluster=replace(cluster, ranks_per_node=ranks_per_node),
    )


def _data_ranks(config: RunConfig, most: int, least: int, *, whole: bool) -> int:
    if whole:
        return most
    most = max(most // least, 1) * least

    def shares_batches(data: int) -> bool:
        at = replace(config, engine=replace(config.engine, mesh=replace(config.engine.mesh, data=data)))
        uneven = (rules_layout.batches_are_shared_evenly, rules_compression.calibration_is_shared_evenly)
        return not any(problem for rule in uneven for problem in rule(at))

    return next((data for data in range(most, least, -least) if shares_batches(data)), least)


__all__ = ["check", "mesh_of", "resolve", "uses_gpu", "warnings"]
