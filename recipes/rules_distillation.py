"""Rules of what a student learns from beside its teacher's logits, and of logits that were written down."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from conf.errors import DataError, Problem
from conf.schema import DistillStage, LogitsStage, PruneStage, RunConfig
from data.logits import MANIFEST_NAME, StoredLogits, differences
from recipes.machine import Machine
from recipes.recording import about_text, learner_of, location_of, manifest_of
from recipes.rules_compression import with_mesh
from recipes.rules_layout import mesh_of, nearest_multiples
from recipes.stage_models import distillation_of, grid_of, model_of_stage, models_of, stages_of, teacher_of_stage
from train.quantities import byte_size


def hidden_states_are_on_the_same_ranks(config: RunConfig, machine: Machine | None = None) -> Iterator[Problem]:
    """Layers that are held against each other exist, and one pipeline rank has both."""
    mesh = config.engine.mesh
    for name, stage in stages_of(config):
        distillation, teacher = distillation_of(stage), teacher_of_stage(config, name)
        if distillation is None or distillation.hidden_states is None or teacher is None:
            continue
        path, layers = f"stages.{name}.distillation.hidden_states.layers", distillation.hidden_states.layers
        sizes = (model_of_stage(config, name).num_layers, teacher.num_layers)
        chunks = mesh.pipeline * mesh.virtual_pipeline
        if not layers:
            yield Problem(path, "is empty; name pairs STUDENT'S: TEACHER'S, or set hidden_states=null.")
        for pair in layers.items():
            wrong = [
                f"the {who} has layers 0 to {size - 1}"
                for who, layer, size in zip(("student", "teacher"), pair, sizes, strict=True)
                if not 0 <= layer < size
            ]
            if wrong:
                yield Problem(path, f"has {pair[0]}: {pair[1]}, and {' and '.join(wrong)}.")
            elif any(size % chunks for size in sizes):
                continue  # told by the rules of layouts
            else:
                ranks = [rank_of_layer(layer, size, config) for layer, size in zip(pair, sizes, strict=True)]
                if ranks[0] != ranks[1]:
                    possible = [
                        layer for layer in range(sizes[1]) if rank_of_layer(layer, sizes[1], config) == ranks[0]
                    ]
                    yield Problem(
                        path,
                        f"has {pair[0]}: {pair[1]}; of {mesh.pipeline} pipeline ranks the student's layer is on number "
                        f"{ranks[0]} and the teacher's on {ranks[1]}, and hidden states do not travel between ranks. "
                        f"On rank {ranks[0]} are the teacher's layers {', '.join(map(str, possible))}.",
                    )


def rank_of_layer(layer: int, num_layers: int, config: RunConfig) -> int:
    """Pipeline rank of a layer; chunks of an interleaved pipeline go round."""
    mesh = config.engine.mesh
    return layer // (num_layers // (mesh.pipeline * mesh.virtual_pipeline)) % mesh.pipeline


def recordings_are_read_by_a_later_stage(config: RunConfig, machine: Machine | None = None) -> Iterator[Problem]:
    """What a stage writes down is what a later one reads, or one that another run has in its order."""
    data = mesh_of(config).data
    for name, stage in stages_of(config):
        if not isinstance(stage, LogitsStage):
            continue
        path, learner = f"stages.{name}.stage", config.stages.get(stage.stage)
        distillation = distillation_of(learner) if learner is not None else None
        if distillation is None:
            possible = ", ".join(other for other, each in config.stages.items() if distillation_of(each)) or "none"
            yield Problem(path, f"'{stage.stage}' is no stage that distils. Possible: {possible}.")
            continue
        earlier = ("init", *config.order[: config.order.index(name)])
        if stage.stage in earlier:
            yield Problem(path, f"'{stage.stage}' comes before '{name}' in order; what it reads must be written first.")
        elif distillation.teacher not in earlier:
            yield Problem(path, f"its teacher, '{distillation.teacher}', is not made before '{name}'.")
        elif stage.stage in config.order and distillation.logits != name:
            yield Problem(
                path, f"'{stage.stage}' does not read it. Set stages.{stage.stage}.distillation.logits={name}."
            )
        training = learner_of(config, stage.stage)[0]
        if distillation.top_k == 0:
            yield Problem(f"stages.{stage.stage}.distillation.top_k", "is 0, and of all logits none are written down.")
        if stage.stage not in config.order and training.global_batch % (data * training.micro_batch):
            multiple = data * training.micro_batch
            yield Problem(
                f"stages.{stage.stage}.training.global_batch",
                f"{training.global_batch} sequences cannot be shared by {data} data ranks in micro-batches of "
                f"{training.micro_batch}. Nearest: {nearest_multiples(training.global_batch, multiple)}.",
            )


def recordings_fit_on_disk(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """What is written down, before compression, fits where it is written to."""
    for name, stage in stages_of(config):
        learner = config.stages.get(stage.stage) if isinstance(stage, LogitsStage) else None
        distillation = distillation_of(learner) if learner is not None else None
        if not isinstance(stage, LogitsStage) or distillation is None:
            continue
        location = location_of(config, name, run_dir=config.runs_dir)
        manifest = manifest_of(config, stage.stage, stage.stored_as, {})
        need = manifest.num_samples * manifest.sample_bytes
        if "://" not in location and need > (free := machine.free_disk_bytes(Path(location))):
            yield Problem(
                f"stages.{name}.location",
                f"{location} has {byte_size(free)} free, and {manifest.num_samples:,} samples of {manifest.tokens} "
                f"tokens, {manifest.top_k} logits each, take up to {byte_size(need)}. Lower top_k or the tokens of "
                f"'{stage.stage}', or set location to another disk or to s3://BUCKET/PATH.",
            )


def recordings_exist_and_fit(config: RunConfig, machine: Machine | None = None) -> Iterator[Problem]:
    """A stage that reads what a teacher said reads the likeliest tokens, of this text, and nothing else of it."""
    for name, stage in stages_of(config):
        distillation = distillation_of(stage)
        if distillation is None or distillation.logits is None:
            continue
        path, logits = f"stages.{name}.distillation", distillation.logits
        if distillation.top_k == 0:
            yield Problem(
                f"{path}.top_k", "is 0, and all of a teacher's logits are never written down. Set it to 64, say."
            )
        if distillation.hidden_states is not None:
            yield Problem(
                f"{path}.hidden_states",
                "are not written down with logits. Set it to null, or logits=null to have the teacher in the "
                "same processes.",
            )
        if logits in config.stages:
            earlier = config.order[: config.order.index(name)]
            if logits not in earlier or not isinstance(config.stages[logits], LogitsStage):
                yield Problem(f"{path}.logits", f"'{logits}' is no stage of kind logits that comes before '{name}'.")
        elif "://" not in logits:
            yield from _problems_of_recording(config, name, f"{path}.logits", Path(logits))


def _problems_of_recording(config: RunConfig, name: str, path: str, folder: Path) -> Iterator[Problem]:
    if not (folder / MANIFEST_NAME).exists():
        yield Problem(
            path,
            f"{folder} is neither a stage nor a recording (there is no {MANIFEST_NAME}; it is written last). Name a "
            "stage of kind logits, or the folder that one wrote.",
        )
        return
    try:
        manifest = StoredLogits.open(str(folder)).manifest
    except DataError as error:
        yield Problem(path, str(error))
        return
    wrong = differences(manifest.about, about_text(config, name), known_only=True)
    training = learner_of(config, name)[0]
    needed = training.num_steps * training.global_batch
    if manifest.num_samples < needed:
        wrong.append(f"it has {manifest.num_samples} samples and {needed} are read")
    if wrong:
        yield Problem(path, f"{folder} was recorded of something else: {'; '.join(wrong)}. Record it anew.")


def shapes_are_those_of_the_grid(config: RunConfig, machine: Machine | None = None) -> Iterator[Problem]:
    """Warn where the axes make another shape of a smaller model than the configuration alone would."""
    mesh = config.engine.mesh
    alone = models_of(with_mesh(config, replace(mesh, tensor=1, pipeline=1, virtual_pipeline=1)))
    for name, stage in stages_of(config):
        if not isinstance(stage, PruneStage | DistillStage) or model_of_stage(config, name) == alone[name]:
            continue
        path, wanted = ("search", stage.search) if isinstance(stage, PruneStage) else ("student", stage.student)
        grid = grid_of(config, wanted)
        yield Problem(
            f"stages.{name}.{path}",
            f"the shape is another on these axes than on one rank, which tensor={mesh.tensor} x pipeline="
            f"{mesh.pipeline} could not share. ffn_multiple={grid.ffn_multiple} kv_heads_multiple="
            f"{grid.kv_heads_multiple} layers_multiple={grid.layers_multiple} make it the same.",
        )


RULES = (
    hidden_states_are_on_the_same_ranks,
    recordings_are_read_by_a_later_stage,
    recordings_exist_and_fit,
    recordings_fit_on_disk,
)
WARNINGS = (shapes_are_those_of_the_grid,)
