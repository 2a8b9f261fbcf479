"""Rules between stages, and between a stage and what it names. No file is looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from conf.errors import Problem
from conf.faults import did_you_mean
from conf.schema import EvaluateStage, PretrainStage, RunConfig
from recipes.machine import Machine
from recipes.rules_compression import present
from recipes.rules_layout import trainings_of
from recipes.stage_models import is_control, makes_a_model


def order_names_stages(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """The order is a list of existing stages, each once."""
    known = ", ".join(config.stages)
    if not config.order:
        yield Problem("order", f"is empty; there is nothing to run. This recipe has the stages {known}.")
    for name, count in Counter(config.order).items():
        if name not in config.stages:
            meant = did_you_mean(name, config.stages)
            yield Problem("order", f"there is no stage '{name}'.{meant} This recipe has {known}.")
        elif count > 1:
            yield Problem("order", f"'{name}' comes {count} times; a stage runs once. Add a stage of another name.")


def weights_come_from_somewhere(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """The first stage makes a model or is given one, and nothing throws a model away."""
    stages = [(name, config.stages[name]) for name in config.order if name in config.stages]
    if not stages:
        return
    first, stage = stages[0]
    if not isinstance(stage, PretrainStage) and config.init is None:
        yield Problem(
            "init",
            f"is null, and '{first}', the first stage of the order, is of kind {stage.kind} and needs a model. "
            "Set init=CHECKPOINT or init=recipe:foundation, or put a pretrain stage first.",
        )
    if isinstance(stage, PretrainStage) and config.init is not None:
        yield Problem(
            "init",
            f"is {config.init}, and the first stage, '{first}', trains from fresh weights. "
            "Set init=null, or make the stage's kind specialise to continue those weights.",
        )
    for name, later in stages[1:]:
        if isinstance(later, PretrainStage):
            yield Problem(
                "order",
                f"'{name}' trains from fresh weights and would throw away what '{first}' made; a pretrain stage can "
                "only come first.",
            )


def evaluated_models_exist(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """An evaluation compares models that exist by then."""
    made = [name for name in config.order if makes_a_model(config.stages.get(name))]
    for position, name in enumerate(config.order):
        stage = config.stages.get(name)
        if not isinstance(stage, EvaluateStage):
            continue
        path = f"stages.{name}.models"
        earlier = [each for each in config.order[:position] if each in made]
        possible = (["init"] if config.init is not None else []) + earlier
        listed = f"[{','.join(possible)}]"
        models = present(config, stage.models)
        if not models:
            yield Problem(path, f"is empty; there is nothing to score. Possible here: {listed}.")
        for model, count in Counter(models).items():
            if count > 1:
                yield Problem(path, f"'{model}' comes {count} times; name each model once.")
            if model in possible:
                continue
            if model == "init":
                why = "'init' is the model the recipe starts from, and init is null"
            elif model in config.stages:
                why = f"'{model}' is not a stage that makes a model before '{name}' in order"
            else:
                why = f"there is no stage '{model}'{did_you_mean(model, possible)}"
            yield Problem(path, f"{why.rstrip('?.')}{'?' if why.endswith('?') else '.'} Possible here: {listed}.")


def sources_exist(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Mixtures and evaluations name sources of `data.sources`."""
    named = {f"stages.{name}.training.mixture": each.sources for name, each in trainings_of(config).items()}
    for name in config.order:
        stage = config.stages.get(name)
        if isinstance(stage, EvaluateStage):
            named[f"stages.{name}.sources"] = stage.sources
    known = ", ".join(config.data.sources)
    for path, sources in named.items():
        if not sources:
            yield Problem(path, f"is empty; name at least one of data.sources: {known}.")
        for source, count in Counter(sources).items():
            if source not in config.data.sources:
                meant = did_you_mean(source, config.data.sources)
                yield Problem(path, f"there is no source '{source}' in data.sources.{meant} There is: {known}.")
            elif count > 1:
                yield Problem(path, f"'{source}' comes {count} times; name each source once.")


def schedules_add_up(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Warm-up and decay leave room for each other."""
    for name, training in trainings_of(config).items():
        optim = training.optim
        if optim.schedule == "wsd" and optim.warmup_fraction + optim.decay_fraction > 1:
            yield Problem(
                f"stages.{name}.training.optim.decay_fraction",
                f"warmup_fraction {optim.warmup_fraction} and decay_fraction {optim.decay_fraction} are more than "
                f"all steps; they must add up to at most 1. Largest decay_fraction: {1 - optim.warmup_fraction:g}.",
            )


def tokens_make_a_step(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Token counts are at least one unit of what they are spent on."""
    for name, training in trainings_of(config).items():
        path = f"stages.{name}.training"
        if training.tokens < training.tokens_per_step:
            yield Problem(
                f"{path}.tokens",
                f"{training.tokens} is less than one step of {training.global_batch} x {training.sequence_length} = "
                f"{training.tokens_per_step} tokens. Raise it to that, or lower global_batch or sequence_length.",
            )
        if training.validation_tokens < training.sequence_length:
            yield Problem(
                f"{path}.validation_tokens",
                f"{training.validation_tokens} is less than one sequence of {training.sequence_length} tokens.",
            )
    for name in config.order:
        stage = config.stages.get(name)
        if isinstance(stage, EvaluateStage) and stage.tokens < stage.sequence_length:
            yield Problem(
                f"stages.{name}.tokens",
                f"{stage.tokens} is less than one sequence of {stage.sequence_length} tokens.",
            )


def stages_left_out(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Warn of stages that will not run."""
    for name, stage in config.stages.items():
        if name not in config.order and (config.controls or not is_control(stage)):
            yield Problem("order", f"leaves out the stage '{name}', which will not run.")


RULES = (
    order_names_stages,
    weights_come_from_somewhere,
    evaluated_models_exist,
    sources_exist,
    schedules_add_up,
    tokens_make_a_step,
)
WARNINGS = (stages_left_out,)
