"""Rules of teachers on ranks of their own: what they can hand on, and whether there is room for them."""

from __future__ import annotations

from collections.abc import Iterator

from conf.errors import Problem
from conf.schema import RunConfig
from parallel.plan.divides import divisors
from recipes import fit, rules_engine, rules_experts, rules_layout, rules_precision
from recipes.chain import for_stage, is_here
from recipes.machine import Machine
from recipes.rules_layout import mesh_of
from recipes.rules_place import gpu_of
from recipes.serving import as_teacher, engine_of_service, mesh_of_service, services_of
from recipes.stage_models import distillation_of, teacher_of_stage
from train.quantities import byte_size

LAYOUT_RULES = (
    rules_layout.tensor_divides_the_model,
    rules_layout.pipeline_divides_the_layers,
    rules_layout.sequence_parallel_has_tensor_ranks,
    rules_layout.sequences_fit,
    rules_layout.batches_are_shared_evenly,
    *rules_engine.RULES,
    *rules_experts.RULES,
    *rules_precision.RULES,
)
"""What the teacher's own axes must divide, and its backend offer."""


def services_hand_on_what_travels(config: RunConfig, machine: Machine | None = None) -> Iterator[Problem]:
    """A teacher on other ranks hands on its likeliest tokens, and nothing else; its ranks are the gang's."""
    for name in services_of(config):
        distillation = distillation_of(config.stages[name])
        assert distillation is not None, "it has a service"
        path = f"stages.{name}.distillation"
        if distillation.top_k == 0:
            yield Problem(
                f"{path}.top_k",
                f"is 0, and all of a teacher's logits ({config.model.vocab_size:,} a token) do not travel. Set it to "
                "64, say, or service=null to have the teacher in the same processes.",
            )
        if distillation.logits is not None:
            yield Problem(
                f"{path}.service",
                f"is given, and so is logits={distillation.logits}: what was written down is not asked again. Set one "
                "of them to null.",
            )
        if distillation.hidden_states is not None:
            yield Problem(
                f"{path}.hidden_states",
                "do not travel from a teacher on other ranks. Set it to null, or service=null to have the teacher in "
                "the same processes.",
            )
        if config.launcher != "gang":
            yield Problem(
                "launcher",
                f"is {config.launcher}, which starts ranks that are all alike; {path}.service needs ranks beside the "
                "student's. Set launcher=gang, or service=null.",
            )


def teachers_of_a_job_are_spread_alike(config: RunConfig, machine: Machine | None = None) -> Iterator[Problem]:
    """A job has one set of teacher's ranks, on one mesh, for all of its stages."""
    here = {name: service for name, service in services_of(config).items() if is_here(config, name)}
    engines = {name: engine_of_service(config, service) for name, service in here.items()}
    first = next(iter(engines), None)
    for name, engine in engines.items():
        if first is not None and engine != engines[first]:
            yield Problem(
                f"stages.{name}.distillation.service",
                f"is spread otherwise than stages.{first}.distillation.service, and a teacher's ranks stay on one "
                "mesh. Make them equal, or let each stage be a job or a run of its own.",
            )


def teachers_layouts_are_possible(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """The teacher's axes divide it, its batches and its nodes, and its backend offers them."""
    for name, service in services_of(config).items():
        teacher = teacher_of_stage(config, name)
        if teacher is None or not is_here(config, name):
            continue
        path = f"stages.{name}.distillation.service"
        at = as_teacher(config, name, service, teacher)
        for rule in LAYOUT_RULES:
            for problem in rule(at, machine):
                where, told = (text.replace("engine.", f"{path}.") for text in (problem.path, problem.message))
                yield Problem(where, told if where.startswith(path) else f"{told} So it is on the mesh of {path}.")
        tensor, ranks_per_node = service.mesh.tensor, config.cluster.ranks_per_node
        if config.cluster.num_nodes > 1 and ranks_per_node is not None:
            first = mesh_of(config).world_size
            if ranks_per_node % tensor or first % tensor:
                fits = [size for size in divisors(ranks_per_node) if first % size == 0]
                yield Problem(
                    f"{path}.mesh.tensor",
                    f"{tensor} tensor ranks of a teacher whose ranks come after {first} of the student's, on nodes of "
                    f"{ranks_per_node}, would cross nodes. Possible: {', '.join(map(str, fits))}.",
                )


def teachers_fit_their_gpus(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """The fullest of a teacher's GPUs holds its share of the weights and a forward pass."""
    gpu = gpu_of(config, machine)
    if gpu is None:
        return
    for name, service in services_of(config).items():
        if not is_here(config, name):
            continue
        serving = fit.serving_of_stage(for_stage(config, name), name)
        assert serving is not None, "it has a service"
        if serving.worst.needed > gpu.memory_bytes:
            parts = ", ".join(f"{part} {byte_size(size)}" for part, size in serving.worst.parts.items() if size)
            yield Problem(
                f"stages.{name}.distillation.service.mesh",
                f"{mesh_of_service(service)} needs {byte_size(serving.worst.needed)} a GPU for the teacher, and "
                f"{gpu.name} has {byte_size(gpu.memory_bytes)}: {parts}. Give it more tensor or pipeline ranks.",
            )


RULES = (
    services_hand_on_what_travels,
    teachers_of_a_job_are_spread_alike,
    teachers_layouts_are_possible,
    teachers_fit_their_gpus,
)
