"""`action=plan`: make the plan, show it, keep it, and say whether the budget is met."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from rich.console import Console

from conf.errors import UserError
from conf.schema import RunConfig
from parallel.plan.memory import StageMemory
from parallel.plan.throughput import StepTime
from recipes.fit import Serving
from recipes.plan import Plan, StagePlan, plan
from recipes.plan_page import plan_page
from recipes.plan_remedies import Remedy, remedies
from recipes.plan_table import print_plan
from recipes.scaling import Point, scaling
from train.rundir import replace_text


def make_plan(config: RunConfig, console: Console) -> None:
    """Print the plan of a resolved configuration and write it to `plan.json` and `plan.html`.

    Raises:
        UserError: the plan is over its budget, or there is none (ConfigError).
    """
    made = plan(config)
    changes = remedies(config, made)
    curves = {stage.name: scaling(config, made, stage) for stage in made.stages}
    print_plan(console, made, changes)
    directory = Path(config.runs_dir) / f"plan-{made.recipe}-{made.cluster}"
    directory.mkdir(parents=True, exist_ok=True)
    files = {
        "plan.json": json.dumps(as_json(made, changes, curves), indent=2) + "\n",
        "plan.html": plan_page(made, changes, curves),
    }
    for name, text in files.items():
        replace_text(directory / name, text)
        console.print(
            f"{name.removeprefix('plan.'):<6}{directory / name}", soft_wrap=True, highlight=False, markup=False
        )
    if not made.is_met:
        over = [f"{each.name} {each.value:,.4g} > {each.limit:,.4g} {each.unit}".strip() for each in made.verdicts]
        over = [text for text, each in zip(over, made.verdicts, strict=True) if not each.is_met]
        raise UserError(f"the plan of {made.recipe} on {made.cluster} is over its budget: {', '.join(over)}.")


def as_json(made: Plan, changes: list[Remedy], curves: dict[str, tuple[Point, ...]]) -> dict[str, object]:
    """Everything of a plan, derived numbers included; units are in the names."""
    return {
        "recipe": made.recipe,
        "cluster": made.cluster,
        "num_gpus": made.num_gpus,
        "num_nodes": made.num_nodes,
        "hardware": dataclasses.asdict(made.hardware),
        "budget": dataclasses.asdict(made.budget),
        "is_met": made.is_met,
        "limits": [dataclasses.asdict(each) | {"is_met": each.is_met} for each in made.verdicts],
        "days": made.days,
        "energy_mwh": made.energy_mwh,
        "most_mw": made.most_mw,
        "dollars": made.dollars,
        "storage_bytes": made.storage_bytes,
        "stages": [_stage(stage, curves[stage.name]) for stage in made.stages],
        "changes": [dataclasses.asdict(each) | {"meets": each.meets(made.budget)} for each in changes],
    }


def _serving(serving: Serving | None) -> dict[str, object] | None:
    if serving is None:
        return None
    return {
        "num_parameters": serving.teacher.shape.num_parameters,
        "layout": dataclasses.asdict(serving.layout) | {"stack": serving.layout.stack.name},
        "memory_bytes": _memory(serving.worst),
    }


def _stage(stage: StagePlan, curve: tuple[Point, ...]) -> dict[str, object]:
    better = stage.better
    return {
        "name": stage.name,
        "kind": stage.kind,
        "model": stage.model,
        "num_parameters": stage.shape.num_parameters,
        "teacher_parameters": stage.teacher.shape.num_parameters if stage.teacher else None,
        "layout": dataclasses.asdict(stage.layout) | {"stack": stage.layout.stack.name},
        "num_gpus": stage.num_gpus,
        "teacher_on_its_own": _serving(stage.serving),
        "memory_bytes": [_memory(each) for each in stage.pipeline],
        "step_seconds": _step(stage.step),
        "tokens_per_s_per_gpu": stage.step.tokens_per_s_per_gpu,
        "mfu": stage.step.mfu,
        "tokens": stage.tokens,
        "num_steps": stage.num_steps,
        "seconds": stage.seconds,
        "goodput": stage.goodput,
        "best_goodput": stage.best_goodput,
        "failures": stage.failures,
        "checkpoints": dataclasses.asdict(stage.saves) | {"kept": stage.kept},
        "energy_mwh": stage.energy_mwh,
        "power": dataclasses.asdict(stage.power),
        "data_bytes": stage.data_bytes,
        "traffic": [dataclasses.asdict(each) for each in stage.traffic],
        "better": {"overrides": better.overrides, "gain": better.gain, "needed_bytes": better.worst.needed}
        if better
        else None,
        "scaling": [dataclasses.asdict(each) for each in curve],
    }


def _memory(stage: StageMemory) -> dict[str, float]:
    return {"pipeline_rank": stage.stage, **stage.parts, "needed": stage.needed}


def _step(step: StepTime) -> dict[str, float]:
    names = [each.name for each in dataclasses.fields(step)]
    parts = names[: names.index("tokens_per_gpu")]
    return {**{name: getattr(step, name) for name in parts}, "total": step.seconds}
