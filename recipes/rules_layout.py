"""Rules between the model, the batch and the parallel axes. Arithmetic only."""

from __future__ import annotations

import math
from collections.abc import Iterator

from conf.errors import Problem
from conf.schema import EvaluateStage, RunConfig, TrainingConfig, TrainingStage
from parallel.mesh import Mesh
from parallel.plan.divides import batch_multiple, divisors, pieces_of_sequence
from recipes.chain import num_teacher_ranks
from recipes.machine import Machine

BUBBLE_WORTH_A_WARNING = 0.25


def mesh_of(config: RunConfig) -> Mesh:
    """The mesh of a resolved configuration."""
    mesh = config.engine.mesh
    assert mesh.data is not None, "the mesh is resolved first"
    # A rule of its own refuses expert groups that do not fit; the other rules look at the rest.
    expert = mesh.expert if mesh.data * mesh.context % mesh.expert == 0 else 1
    return Mesh(pipeline=mesh.pipeline, data=mesh.data, context=mesh.context, tensor=mesh.tensor, expert=expert)


def trainings_of(config: RunConfig) -> dict[str, TrainingConfig]:
    """The stages of the order that train: name -> its training."""
    stages = {name: config.stages[name] for name in config.order if name in config.stages}
    trainings = {name: getattr(stage, "training", None) for name, stage in stages.items()}
    return {name: training for name, training in trainings.items() if isinstance(training, TrainingConfig)}


def nearest_multiples(value: int, size: int) -> str:
    """The multiples of `size` around `value`, in words: `96 or 108`."""
    below = value // size * size
    return f"{below} or {below + size}" if below else str(size)


def ranks_are_all_used(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """The product of the axes is the number of ranks, those of a teacher apart."""
    mesh, cluster = mesh_of(config), config.cluster
    if cluster.ranks_per_node is None:
        return
    whole, teachers = cluster.num_nodes * cluster.ranks_per_node, num_teacher_ranks(config)
    num_ranks = whole - teachers
    if mesh.world_size == num_ranks:
        return
    others = mesh.world_size // mesh.data
    less = f" less {teachers} of the teacher = {num_ranks}" if teachers else ""
    if num_ranks <= 0:
        remedy = "Add nodes, or shrink an axis of the teacher (distillation.service.mesh)"
    elif num_ranks % others == 0:
        remedy = f"Set engine.mesh.data={num_ranks // others}, or null to let it follow"
    else:
        remedy = f"tensor x context x pipeline is {others} and must divide {num_ranks}"
    yield Problem(
        "engine.mesh",
        f"{mesh} is {mesh.world_size} ranks, and cluster {cluster.name} has {cluster.num_nodes} x "
        f"{cluster.ranks_per_node} = {whole}{less}; the axes must multiply to that. {remedy}.",
    )


def tensor_ranks_share_a_node(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Tensor ranks talk in every layer, so they stay within a node."""
    tensor, ranks_per_node = config.engine.mesh.tensor, config.cluster.ranks_per_node
    if ranks_per_node is not None and config.cluster.num_nodes > 1 and ranks_per_node % tensor:
        possible = ", ".join(map(str, divisors(ranks_per_node)))
        yield Problem(
            "engine.mesh.tensor",
            f"{tensor} tensor ranks do not fit evenly into nodes of {ranks_per_node} ranks, and a tensor group must "
            f"not cross nodes. Possible: {possible}.",
        )


def tensor_divides_the_model(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Every tensor rank holds the same share of heads, of the feed-forward layer and of the vocabulary."""
    model, tensor = config.model, config.engine.mesh.tensor
    sizes = {
        "num_attention_heads": model.num_attention_heads,
        "num_kv_heads": model.num_kv_heads,
        "ffn_hidden_size": model.ffn_hidden_size,
    }
    uneven = [f"model.{name}={size}" for name, size in sizes.items() if size % tensor]
    if uneven:
        possible = ", ".join(map(str, divisors(math.gcd(*sizes.values()))))
        yield Problem(
            "engine.mesh.tensor",
            f"{tensor} tensor ranks cannot share {' and '.join(uneven)} evenly. Possible for this model: {possible}.",
        )
    if model.vocab_size % tensor:
        yield Problem(
            "model.vocab_size",
            f"{model.vocab_size} cannot be split over {tensor} tensor ranks; it must be a multiple of {tensor}. "
            f"Nearest above: {-(-model.vocab_size // tensor) * tensor} (unused ids do no harm).",
        )


def pipeline_divides_the_layers(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Every pipeline rank holds the same number of layers, in equal chunks."""
    layers, mesh = config.model.num_layers, config.engine.mesh
    chunks = mesh.pipeline * mesh.virtual_pipeline
    if layers % chunks:
        by = f"pipeline {mesh.pipeline}"
        if mesh.virtual_pipeline > 1:
            by += f" x virtual_pipeline {mesh.virtual_pipeline} = {chunks}"
        possible = ", ".join(map(str, divisors(layers)))
        yield Problem(
            "engine.mesh.pipeline",
            f"model.num_layers={layers} cannot be dealt evenly to {by}; the product must divide it. "
            f"Possible products: {possible}.",
        )
    if mesh.virtual_pipeline > 1 and mesh.pipeline == 1:
        yield Problem(
            "engine.mesh.virtual_pipeline",
            f"{mesh.virtual_pipeline} layer chunks are interleaved between pipeline ranks, and there is one. "
            "Set engine.mesh.virtual_pipeline=1, or engine.mesh.pipeline to 2 or more.",
        )


def heads_fit_each_other(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Query heads share key-value heads evenly, and rotary positions turn pairs of dimensions."""
    model = config.model
    if model.num_attention_heads % model.num_kv_heads:
        possible = ", ".join(map(str, divisors(model.num_attention_heads)))
        yield Problem(
            "model.num_kv_heads",
            f"{model.num_attention_heads} attention heads cannot share {model.num_kv_heads} key-value heads evenly. "
            f"Possible: {possible}.",
        )
    if model.head_dim % 2:
        yield Problem(
            "model.head_dim",
            f"is {model.head_dim}; rotary positions turn pairs of dimensions, so it must be even. "
            f"Nearest: {nearest_multiples(model.head_dim, 2)}.",
        )


def sequence_parallel_has_tensor_ranks(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Sequence parallelism splits over the tensor axis."""
    if config.engine.sequence_parallel and config.engine.mesh.tensor == 1:
        yield Problem(
            "engine.sequence_parallel",
            "splits norms and residuals over the tensor axis, which has size 1. "
            "Set engine.sequence_parallel=false, or engine.mesh.tensor to 2 or more.",
        )


def sequences_fit(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Sequences are within the model's length and can be split over the context and tensor axes."""
    for name in config.order:
        match config.stages.get(name):
            case stage if isinstance(stage, TrainingStage):
                yield from problems_of_length(
                    config, f"stages.{name}.training.sequence_length", stage.training.sequence_length
                )
            case EvaluateStage(sequence_length=length):
                yield from problems_of_length(config, f"stages.{name}.sequence_length", length)
            case _:
                continue


def problems_of_length(config: RunConfig, path: str, length: int) -> Iterator[Problem]:
    """What is wrong with rows of so many tokens; `path` says so."""
    mesh, engine = config.engine.mesh, config.engine
    longest = config.model.max_sequence_length
    if length > longest:
        yield Problem(path, f"is {length}; the model's positions end at model.max_sequence_length={longest}.")
    pieces = pieces_of_sequence(context=mesh.context, tensor=mesh.tensor, sequence_parallel=engine.sequence_parallel)
    if length % pieces:
        axes = [f"{mesh.context} context ranks"] if mesh.context > 1 else []
        axes += [f"{mesh.tensor} sequence-parallel tensor ranks"] if engine.sequence_parallel else []
        yield Problem(
            path,
            f"{length} tokens cannot be split over {' and '.join(axes)}; it must be a multiple of {pieces}. "
            f"Nearest: {nearest_multiples(length, pieces)}.",
        )


def batches_are_shared_evenly(config: RunConfig, machine: Machine | None = None) -> Iterator[Problem]:
    """Every data rank gets the same number of micro-batches, in whole rounds where the pipeline is interleaved."""
    mesh = mesh_of(config)
    virtual = config.engine.mesh.virtual_pipeline
    rounds = mesh.pipeline if virtual > 1 else 1
    for name, training in trainings_of(config).items():
        batch, micro = training.global_batch, training.micro_batch
        multiple = batch_multiple(data=mesh.data, micro_batch=micro, pipeline=mesh.pipeline, virtual_pipeline=virtual)
        path = f"stages.{name}.training.global_batch"
        if batch % (mesh.data * micro):
            yield Problem(
                path,
                f"{batch} sequences cannot be shared by {mesh.data} data ranks in micro-batches of {micro}; it must "
                f"be a multiple of {multiple}. "
                f"Nearest: {nearest_multiples(batch, multiple)}.",
            )
        elif batch // (mesh.data * micro) % rounds:
            yield Problem(
                path,
                f"{batch} sequences are {batch // (mesh.data * micro)} micro-batches a data rank, and an interleaved "
                f"pipeline takes them in rounds of {mesh.pipeline}; it must be a multiple of "
                f"{multiple}. Nearest: {nearest_multiples(batch, multiple)}.",
            )


def pipeline_is_kept_busy(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Warn where pipeline ranks mostly wait."""
    mesh = mesh_of(config)
    for name, training in trainings_of(config).items():
        num_micro_batches = training.global_batch // (mesh.data * training.micro_batch)
        work = num_micro_batches * config.engine.mesh.virtual_pipeline
        bubble = (mesh.pipeline - 1) / (work + mesh.pipeline - 1)
        if bubble > BUBBLE_WORTH_A_WARNING:
            yield Problem(
                f"stages.{name}.training.global_batch",
                f"{num_micro_batches} micro-batches a data rank keep {mesh.pipeline} pipeline ranks waiting "
                f"{100 * bubble:.0f} % of the time. A larger global_batch, a smaller micro_batch, fewer data ranks or "
                "virtual_pipeline would shorten it.",
            )


RULES = (
    ranks_are_all_used,
    tensor_ranks_share_a_node,
    tensor_divides_the_model,
    pipeline_divides_the_layers,
    heads_fit_each_other,
    sequence_parallel_has_tensor_ranks,
    sequences_fit,
    batches_are_shared_evenly,
)
WARNINGS = (pipeline_is_kept_busy,)
