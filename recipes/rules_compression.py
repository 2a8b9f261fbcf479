"""Rules of pruning, distillation and what they are compared with. Arithmetic and names; no file is looked at."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace

from conf.errors import Problem
from conf.faults import did_you_mean
from conf.schema import (
    CalibrationConfig,
    ControlStage,
    DistillStage,
    EvaluateStage,
    ExportStage,
    MeshConfig,
    PruneStage,
    QuantiseStage,
    RecoverStage,
    RunConfig,
    SearchConfig,
)
from parallel.plan.divides import divisors
from parallel.shapes import shapes_that_hold, size_of, smaller_shapes, student_shapes
from recipes.machine import Machine
from recipes.rules_layout import mesh_of, nearest_multiples, problems_of_length
from recipes.rules_place import gpu_of, state_bytes
from recipes.stage_models import (
    distillation_of,
    given_shapes,
    grid_of,
    makes_a_model,
    model_of_stage,
    stages_of,
    teacher_of_stage,
)
from train.quantities import byte_size

# Cut deeper at once, models are hard to recover (Muralidharan et al. 2024).
DEEPEST_CUT = 0.5
MOST_TENSOR_RANKS = 8
NEW_TOKENS = 16
"""Written after a prompt when exported models are timed."""


def present(config: RunConfig, names: Iterable[str]) -> tuple[str, ...]:
    """Models of these names that there will be: stages that are left out of the order are passed over.

    So a recipe can name all its models and be run in part; `stages_left_out` tells which are missing.
    """
    return tuple(name for name in names if name not in config.stages or name in config.order)


def calibrations_of(config: RunConfig) -> dict[str, CalibrationConfig]:
    """Path -> calibration text that is used."""
    found = {}
    for name, stage in stages_of(config):
        if isinstance(stage, PruneStage | QuantiseStage):
            found[f"stages.{name}.calibration"] = stage.calibration
        elif isinstance(stage, DistillStage) and stage.student.start == "pruned":
            found[f"stages.{name}.student.calibration"] = stage.student.calibration
    return found


def named_models_exist(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """A stage names models that earlier stages made: a teacher, a parent, what it is compared with."""
    earlier = ["init"] if config.init is not None else []
    for name, stage in stages_of(config):
        path = f"stages.{name}"
        named: dict[str, str | None] = {}
        match stage:
            case PruneStage():
                named = {f"{path}.model": stage.model, f"{path}.shape_of": stage.shape_of}
            case RecoverStage() | DistillStage():
                named = {f"{path}.distillation.teacher": stage.distillation.teacher}
            case QuantiseStage():
                named = {f"{path}.model": stage.model}
            case ExportStage():
                named = {f"{path}.models": model for model in present(config, stage.models) if model not in earlier}
            case ControlStage():
                named = {f"{path}.model": stage.model, f"{path}.flops_of": stage.flops_of}
            case _:
                pass
        for where, wanted in named.items():
            if wanted is None:
                continue
            if wanted not in earlier:
                possible = ", ".join(earlier) or "nothing yet"
                late = f" It comes after '{name}' in order." if wanted in config.order else ""
                meant = "" if late else did_you_mean(wanted, earlier)
                yield Problem(
                    where, f"no stage before '{name}' makes a model '{wanted}'.{late}{meant} Possible: {possible}."
                )
            elif where.endswith("flops_of") and distillation_of(config.stages[wanted]) is None:
                yield Problem(where, f"'{wanted}' has no teacher whose FLOPs could count. Name a distilling stage.")
        if makes_a_model(stage):
            earlier.append(name)


def smoothing_has_a_use(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Outliers of inputs matter only where inputs are rounded."""
    for name, stage in stages_of(config):
        if isinstance(stage, QuantiseStage) and stage.scheme == "w8a16" and stage.smoothing is not None:
            yield Problem(
                f"stages.{name}.smoothing",
                f"is {stage.smoothing:g}; it makes inputs easier to round, and scheme=w8a16 leaves them as they are. "
                "Set it to null, or scheme=w8a8.",
            )


def calibration_is_sound(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Calibration text is of sources there are, and of rows the model can read and ranks can split."""
    known = ", ".join(config.data.sources)
    for path, calibration in calibrations_of(config).items():
        if not calibration.mixture:
            yield Problem(f"{path}.mixture", f"is empty; there is nothing to calibrate with. There is: {known}.")
        for source in calibration.mixture:
            if source not in config.data.sources:
                meant = did_you_mean(source, config.data.sources)
                yield Problem(f"{path}.mixture", f"there is no source '{source}'.{meant} There is: {known}.")
        yield from problems_of_length(config, f"{path}.sequence_length", calibration.sequence_length)


def calibration_is_shared_evenly(config: RunConfig, machine: Machine | None = None) -> Iterator[Problem]:
    """The rows of calibration text are shared by the data ranks in whole micro-batches."""
    mesh = mesh_of(config)
    for path, calibration in calibrations_of(config).items():
        length = calibration.sequence_length
        texts = {f"{path}.tokens": calibration.tokens}
        stage = config.stages[path.split(".")[1]]
        if isinstance(stage, PruneStage) and stage.shape is None and stage.shape_of is None:
            texts[f"stages.{path.split('.')[1]}.search.tokens"] = stage.search.tokens
        share = calibration.micro_batch * mesh.data
        for where, tokens in texts.items():
            if -(-tokens // length) % share:
                yield Problem(
                    where,
                    f"{tokens} are {-(-tokens // length)} rows of {length}, which {mesh.data} data ranks cannot "
                    f"share in micro-batches of {calibration.micro_batch}; rows must be a multiple of {share}. "
                    f"Nearest: {nearest_multiples(tokens, share * length)} tokens.",
                )


def shapes_can_be_sharded_and_exported(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """A shape that is given fits the mesh, the parent and Hugging Face's Llama or Mixtral."""
    mesh = config.engine.mesh
    chunks = mesh.pipeline * mesh.virtual_pipeline
    for path, shape in given_shapes(config).items():
        for field, size in asdict(shape).items():
            most = getattr(config.model, field)
            if size is not None and size > most:
                yield Problem(f"{path}.{field}", f"is {size}, more than model.{field}={most}; it can only shrink.")
        heads = shape.num_attention_heads
        if shape.hidden_size % heads:
            yield Problem(
                f"{path}.hidden_size",
                f"{shape.hidden_size} is no multiple of num_attention_heads={heads}, and Hugging Face's Llama refuses "
                f"that. Nearest: {nearest_multiples(shape.hidden_size, heads)}.",
            )
        if heads % shape.num_kv_heads:
            possible = ", ".join(map(str, divisors(heads)))
            yield Problem(
                f"{path}.num_kv_heads",
                f"{heads} heads cannot share {shape.num_kv_heads} key-value heads evenly. Possible: {possible}.",
            )
        for field in ("num_attention_heads", "num_kv_heads", "ffn_hidden_size"):
            size = getattr(shape, field)
            if size % mesh.tensor:
                yield Problem(
                    f"{path}.{field}",
                    f"{mesh.tensor} tensor ranks cannot share {size} evenly. "
                    f"Nearest: {nearest_multiples(size, mesh.tensor)}.",
                )
        if shape.num_layers % chunks:
            yield Problem(
                f"{path}.num_layers",
                f"{shape.num_layers} layers cannot be dealt evenly to pipeline x virtual_pipeline = {chunks}. "
                f"Nearest: {nearest_multiples(shape.num_layers, chunks)}.",
            )


def targets_can_be_held(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Some shape of the grid is as small as asked. Only where the model that is cut has the recipe's shape."""
    cut_before = False
    for name, stage in stages_of(config):
        if isinstance(stage, PruneStage) and stage.shape is None and stage.shape_of is None and not cut_before:
            yield from _problems_of_search(config, f"stages.{name}.search", stage.search)
        if isinstance(stage, DistillStage) and stage.student.shape is None:
            yield from _problems_of_student(config, f"stages.{name}.student", stage)
        cut_before = cut_before or (isinstance(stage, PruneStage) and not stage.control)


def _problems_of_search(config: RunConfig, path: str, search: SearchConfig) -> Iterator[Problem]:
    grid = grid_of(config, search)
    model, measure = config.model, search.measure
    if shapes_that_hold(model, cut=search.cut, measure=measure, removed=search.removed, grid=grid):
        return
    sizes = [size_of(shape, measure) for shape in smaller_shapes(model, search.cut, grid)]
    if sizes:
        most = math.floor((1 - min(sizes) / size_of(model, measure)) * 100) / 100
        remedy = f"Most that can go: {most:g}; cut deeper in several prune and recover stages"
    else:
        remedy = "No shape is smaller: set smaller hidden_multiple and ffn_multiple"
    yield Problem(
        f"{path}.removed",
        f"no shape with cut={search.cut} has {search.removed:g} less {measure}, at least half of each size being kept. "
        f"{remedy}, or set cut=mixed.",
    )


def _problems_of_student(config: RunConfig, path: str, stage: DistillStage) -> Iterator[Problem]:
    grid = grid_of(config, stage.student)
    shapes = list(student_shapes(config.model, stage.student.ratio, grid))
    if not shapes:
        yield Problem(
            path,
            "no student's shape fits: hidden_multiple, ffn_multiple, the tensor and the pipeline axis leave none. "
            "Set smaller multiples, or give a shape.",
        )
        return
    smallest = min(shape.num_parameters for shape in shapes)
    if smallest * stage.student.ratio > 1.2 * config.model.num_parameters:
        yield Problem(
            f"{path}.ratio",
            f"is {stage.student.ratio:g}, and the smallest shape of the grid has {smallest:,} parameters, a "
            f"{config.model.num_parameters / smallest:.3g}th of the teacher's. "
            "Set smaller multiples or a smaller ratio.",
        )


def divergences_can_be_computed(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """The teacher's logits are enough for the divergence."""
    for name, stage in stages_of(config):
        distillation = distillation_of(stage)
        if distillation is None:
            continue
        if distillation.top_k > config.model.vocab_size:
            yield Problem(
                f"stages.{name}.distillation.top_k",
                f"is {distillation.top_k}; the vocabulary has {config.model.vocab_size}. 0 keeps all.",
            )


def evaluation_has_its_models(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Baselines, comparisons and targets are about models that are evaluated, and a target has one limit."""
    for name, stage in stages_of(config):
        if not isinstance(stage, EvaluateStage):
            continue
        path, possible = f"stages.{name}", ", ".join(stage.models)
        named = {f"{path}.ngram_models": stage.ngram_models}
        for model, baselines in (stage.comparisons or {}).items():
            named[f"{path}.comparisons.{model}"] = (model, *baselines)
        for label, target in stage.targets.items():
            where = f"{path}.targets.{label}"
            named[where] = (target.model, target.baseline)
            if (target.at_least is None) == (target.at_most is None):
                yield Problem(where, "has at_least or at_most, one of them; set the other to null.")
            if target.source not in stage.sources:
                yield Problem(where, f"source '{target.source}' is not evaluated: {', '.join(stage.sources)}.")
        for where, models in named.items():
            for model in models:
                if model not in stage.models:
                    yield Problem(where, f"'{model}' is not among the models that are evaluated: {possible}.")


def speed_can_be_measured(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """What is timed is exported, and a prompt and what is written after it fit the model."""
    stages = dict(stages_of(config))
    exports = {name: stage for name, stage in stages.items() if isinstance(stage, ExportStage)}
    exported = {model for stage in exports.values() for model in present(config, stage.models)}
    for name, export in exports.items():
        length, most = export.speed_prompt_tokens + NEW_TOKENS, config.model.max_sequence_length
        if export.models and export.speed_prompt_tokens and length > most:
            yield Problem(
                f"stages.{name}.speed_prompt_tokens",
                f"is {export.speed_prompt_tokens}, and {NEW_TOKENS} tokens are written after it: positions end at "
                f"model.max_sequence_length={most}. Set it to {most - NEW_TOKENS} at most, or to 0 to measure none.",
            )
    for name, stage in stages.items():
        if not isinstance(stage, EvaluateStage) or not exports:
            continue
        for label, target in stage.targets.items():
            for model in present(config, (target.model, target.baseline)):
                if target.quantity == "speed" and model not in exported:
                    yield Problem(
                        f"stages.{name}.targets.{label}",
                        f"speed is that of exported models, and '{model}' is not among them: "
                        f"{', '.join(sorted(exported))}.",
                    )


def teachers_fit_beside_students(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """The fullest GPU holds the teacher's weights and the student's training state, even before activations."""
    gpu = gpu_of(config, machine)
    if gpu is None:
        return
    have = int(gpu.memory_bytes)
    for name, stage in stages_of(config):
        distillation = distillation_of(stage)
        if distillation is None or distillation.logits is not None or distillation.service is not None:
            continue
        need = distilling_bytes(config, name)
        if need <= have:
            continue
        fits = next(
            (
                f"engine.mesh.tensor={mesh.tensor} engine.mesh.pipeline={mesh.pipeline} would need {byte_size(least)}"
                for mesh in other_layouts(config)
                if (least := distilling_bytes(with_mesh(config, mesh), name)) <= have
            ),
            "no layout of so many ranks fits; use more GPUs, or a smaller teacher",
        )
        yield Problem(
            f"stages.{name}.distillation.teacher",
            f"{mesh_of(config)} needs at least {byte_size(need)} a GPU for the teacher's weights and the student's "
            f"weights, gradients and Adam, and a GPU has {byte_size(have)}. {fits[0].upper()}{fits[1:]}.",
        )


def with_mesh(config: RunConfig, mesh: MeshConfig) -> RunConfig:
    """The same run with other axes."""
    return replace(config, engine=replace(config.engine, mesh=mesh))


def other_layouts(config: RunConfig) -> Iterator[MeshConfig]:
    """Axes for the same number of ranks, those with the fewest tensor and pipeline ranks first."""
    mesh, world_size = config.engine.mesh, mesh_of(config).world_size
    for tensor in divisors(math.gcd(MOST_TENSOR_RANKS, config.model.num_kv_heads)):
        for pipeline in divisors(config.model.num_layers):
            data, rest = divmod(world_size, tensor * pipeline * mesh.context)
            if data and not rest and data * mesh.context % mesh.expert == 0:
                yield replace(mesh, tensor=tensor, pipeline=pipeline, data=data, virtual_pipeline=1)


def distilling_bytes(config: RunConfig, name: str) -> int:
    """Least memory the fullest rank needs while a stage distils."""
    teacher, student = teacher_of_stage(config, name), model_of_stage(config, name)
    assert teacher is not None, "the stage has a teacher"
    return state_bytes(replace(config, model=teacher, order=())) + state_bytes(replace(config, model=student))


def cuts_are_shallow(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Warn of a cut that no recovery makes good."""
    for name, stage in stages_of(config):
        if isinstance(stage, PruneStage) and stage.shape_of is None and stage.search.removed > DEEPEST_CUT:
            yield Problem(
                f"stages.{name}.search.removed",
                f"is {stage.search.removed:g}; more than {DEEPEST_CUT:g} at once is hard to recover. "
                "Prune and recover in several stages.",
            )


RULES = (
    named_models_exist,
    smoothing_has_a_use,
    calibration_is_sound,
    calibration_is_shared_evenly,
    shapes_can_be_sharded_and_exported,
    targets_can_be_held,
    divergences_can_be_computed,
    evaluation_has_its_models,
    speed_can_be_measured,
    teachers_fit_beside_students,
)
WARNINGS = (cuts_are_shallow,)
