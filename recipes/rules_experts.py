"""Rules of a mixture of experts: the model's own, and how its experts are spread. Arithmetic only."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

from conf.errors import Problem
from conf.schema import QuantiseStage, RunConfig
from parallel.plan.divides import divisors
from recipes.machine import Machine
from recipes.rules_layout import mesh_of, nearest_multiples
from recipes.stage_models import given_shapes, stages_of


def tokens_have_experts_to_choose(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """A token goes through at least two experts, whose weights teach the router, and at most all of them."""
    experts = config.model.experts
    if experts is None:
        return
    path, per_token = "model.experts.num_experts_per_token", experts.num_experts_per_token
    if per_token > experts.num_experts:
        yield Problem(
            path, f"a token cannot go to {per_token} of {experts.num_experts} experts. Largest: {experts.num_experts}."
        )
    elif per_token == 1:
        yield Problem(
            path,
            "with one expert a token its weight is always 1, and the router learns nothing from the text. "
            "Set it to 2 or more, with narrower experts for the same work a token.",
        )


def experts_are_shared_evenly(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Each rank of an expert group holds the same number of experts, and groups are parts of data x context."""
    model, mesh = config.model, config.engine.mesh
    if mesh.expert == 1:
        return
    if model.experts is None:
        yield Problem(
            "engine.mesh.expert",
            f"is {mesh.expert}, and model {model.name} has no experts to share. Set engine.mesh.expert=1, or a model "
            "with experts (model=mixtral_8x7b).",
        )
        return
    replicas = mesh_of(config).num_replicas
    possible = ", ".join(map(str, divisors(gcd(model.experts.num_experts, replicas))))
    if model.experts.num_experts % mesh.expert:
        yield Problem(
            "engine.mesh.expert",
            f"{model.experts.num_experts} experts cannot be shared by {mesh.expert} ranks evenly. Possible with "
            f"data {mesh.data} x context {mesh.context}: {possible}.",
        )
    if replicas % mesh.expert:
        yield Problem(
            "engine.mesh.expert",
            f"data {mesh.data} x context {mesh.context} = {replicas} ranks cannot be cut into expert groups of "
            f"{mesh.expert}; they hold the same weights but for the experts. Possible: {possible}; or data x context "
            f"of {nearest_multiples(replicas, mesh.expert)}.",
        )


def fewer_experts_are_shared_and_suffice(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Of a shape that is given: expert ranks share its experts out evenly, and there are as many as a token takes."""
    experts, mesh = config.model.experts, config.engine.mesh
    for path, shape in given_shapes(config).items():
        number, where = shape.num_experts, f"{path}.num_experts"
        if number is None:
            continue
        if experts is None:
            if number > 1:
                yield Problem(where, f"is {number}, and model {config.model.name} is dense. Set it to null.")
        elif number < experts.num_experts_per_token:
            yield Problem(
                where,
                f"is {number}, and a token goes through model.experts.num_experts_per_token="
                f"{experts.num_experts_per_token}. Smallest: {experts.num_experts_per_token}.",
            )
        elif number % mesh.expert:
            yield Problem(
                where,
                f"{number} experts cannot be shared by engine.mesh.expert={mesh.expert} ranks evenly. "
                f"Nearest: {nearest_multiples(number, mesh.expert)}.",
            )


def weights_of_all_experts_are_rounded_alone(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """What loads an exported model multiplies experts out of packed weights, all layers alike, and rounds no input."""
    if config.model.experts is None:
        return
    for name, stage in stages_of(config):
        if not isinstance(stage, QuantiseStage):
            continue
        for field, only in (("scheme", "w8a16"), ("smoothing", None), ("most_cost", None)):
            value = getattr(stage, field)
            if value != only:
                yield Problem(
                    f"stages.{name}.{field}",
                    f"is {value}, and model {config.model.name} has {config.model.num_experts} experts a layer: "
                    "transformers loads their weights in INT8, of all layers, and rounds no inputs. Set scheme=w8a16 "
                    "smoothing=null most_cost=null, or leave the stage out of order.",
                )


def experts_split_sequences_with_tensors(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Without sequence parallelism every tensor rank would send every token to its expert."""
    if config.model.experts is not None and config.engine.mesh.tensor > 1 and not config.engine.sequence_parallel:
        yield Problem(
            "engine.sequence_parallel",
            f"is false, and with {config.engine.mesh.tensor} tensor ranks experts need it: each tensor rank sends its "
            "part of the sequence to the experts. Set engine.sequence_parallel=true.",
        )


def expert_ranks_share_a_node(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Warn of expert groups that cross nodes: every token travels to its experts and back, in every layer."""
    mesh, ranks_per_node = config.engine.mesh, config.cluster.ranks_per_node
    span = mesh.tensor * mesh.expert
    if mesh.expert > 1 and config.cluster.num_nodes > 1 and ranks_per_node is not None and ranks_per_node % span:
        yield Problem(
            "engine.mesh.expert",
            f"tensor {mesh.tensor} x expert {mesh.expert} = {span} ranks do not fit evenly into nodes of "
            f"{ranks_per_node}, so tokens cross nodes on the way to their experts, in every layer. Products within a "
            f"node: {', '.join(map(str, divisors(ranks_per_node)))}.",
        )


def experts_take_their_share(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Warn of experts that must drop tokens however evenly they are used."""
    experts = config.model.experts
    if experts is not None and experts.capacity_factor is not None and experts.capacity_factor < 1:
        yield Problem(
            "model.experts.capacity_factor",
            f"is {experts.capacity_factor:g}: experts leave out at least {1 - experts.capacity_factor:.0%} of what is "
            "sent to them, even when it is sent evenly. 1.25 is usual, null leaves nothing out.",
        )


RULES = (
    tokens_have_experts_to_choose,
    experts_are_shared_evenly,
    fewer_experts_are_shared_and_suffice,
    weights_of_all_experts_are_rounded_alone,
    experts_split_sequences_with_tensors,
)
WARNINGS = (expert_ranks_share_a_node, experts_take_their_share)
