"""Finding the run to continue, and the configuration it continues with: its own, but for where and how it runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from conf import load
from conf.errors import ConfigError, Problem, UserError
from conf.schema import DistillStage, MeshConfig, RecoverStage, RunConfig, ServiceConfig
from train import rundir
from train.rundir import RunDir

# The law of layouts: these never change what is computed, so a continued run may have others.
FREE = frozenset({"engine", "cluster", "launcher", "tracking", "budget", "runs_dir"})
NOT_COMPARED = frozenset({"action", "resume", "init", "overrides", "full_size", "description"})


def reopen(config: RunConfig) -> tuple[RunDir, RunConfig]:
    """The run that `config.resume` names, and its configuration: the overrides it began with, then those typed now.

    Raises:
        UserError: there is no such run, or it is finished.
        ConfigError: an override typed now would change what the run computes.
    """
    run = find(config)
    saved = load.read(run.config_file)
    typed = [text for text in config.overrides if text.lstrip("+").split("=")[0] not in ("recipe", "resume")]
    merged = load.compose([*saved.overrides, *typed])
    problems = [
        Problem(
            field,
            f"{run.name} began with {getattr(saved, field)!r} and would go on with {getattr(merged, field)!r}; "
            f"only {', '.join(sorted(FREE))} may change. Drop the override, or start a new run (init={run.path}).",
        )
        for field in (each.name for each in dataclasses.fields(RunConfig))
        if field not in FREE | NOT_COMPARED and getattr(computed(saved), field) != getattr(computed(merged), field)
    ]
    if problems:
        raise ConfigError(problems)
    return run, dataclasses.replace(
        merged, action=config.action, init=saved.init, overrides=saved.overrides, resume=str(run.path)
    )


def computed(config: RunConfig) -> RunConfig:
    """The same without where teachers are, which changes nothing but what their logits are rounded to on the way."""
    stages = dict(config.stages)
    for name, stage in stages.items():
        if isinstance(stage, RecoverStage | DistillStage) and stage.distillation.service is not None:
            rounded = ServiceConfig(mesh=MeshConfig(), sent_as=stage.distillation.service.sent_as)
            service = None if rounded.sent_as == "fp32" else rounded
            stages[name] = dataclasses.replace(
                stage, distillation=dataclasses.replace(stage.distillation, service=service)
            )
    return dataclasses.replace(config, stages=stages)


def find(config: RunConfig) -> RunDir:
    """The run directory that `config.resume` names.

    Raises:
        UserError: there is none, or it is finished.
    """
    assert config.resume is not None
    if config.resume == "latest":
        path = rundir.newest_unfinished(Path(config.runs_dir), config.name)
        if path is None:
            raise UserError(
                f"resume=latest: there is no unfinished run of {config.name} in {Path(config.runs_dir).absolute()}. "
                "Name one with resume=RUN_DIR, or drop resume to start a new run."
            )
    else:
        path = Path(config.resume).resolve()
    run = RunDir(path)
    if not run.config_file.exists():
        raise UserError(f"resume={config.resume}: {path} is not a run directory (it has no config.json).")
    if run.status() == "finished":
        raise UserError(f"resume={config.resume}: {run.name} is finished; there is nothing to continue.")
    return run
