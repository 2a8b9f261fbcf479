"""What the records of a run add up to; the screen's last table, W&B's summary and the report all show this."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from train.metrics import steps_of, validations_of
from train.records import (
    Candidate,
    Checkpoint,
    Comparison,
    Evaluation,
    Export,
    Message,
    Quantisation,
    Record,
    RunStarted,
    Speed,
    StageStarted,
    Step,
    Target,
    Task,
    Validation,
    Variant,
)

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSummary:
    """One stage.

    Attributes:
        started: its newest start; a resumed stage has several.
        steps: the steps that count, in order; none for a stage that does not train.
        validations: those that count, in order of step.
        seconds: time spent in it over all attempts.
        done: it came to its end rather than to a stop.
    """

    started: StageStarted
    steps: list[Step]
    validations: list[Validation]
    seconds: float
    done: bool

    @property
    def name(self) -> str:
        """Its name in the recipe."""
        return self.started["stage"]

    @property
    def trains(self) -> bool:
        """Whether it takes optimizer steps."""
        return self.started["num_steps"] > 0

    @property
    def last_validations(self) -> list[Validation]:
        """The newest validation of each source."""
        return list({validation["source"]: validation for validation in self.validations}.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """A whole run.

    Attributes:
        started: newest start of the driver, None where even that was not recorded.
        status: finished, stopped, failed, or running (also when the driver was killed).
        exit_code: of the driver, None while it runs.
        first_time: unix seconds of the first record.
        seconds: time spent over all attempts.
        stages: in the order they first began.
        checkpoints: one for each stage and step, oldest first.
    """

    started: RunStarted | None
    status: str
    exit_code: int | None
    first_time: float
    seconds: float
    stages: list[StageSummary]
    evaluations: list[Evaluation]
    comparisons: list[Comparison]
    candidates: list[Candidate]
    quantisations: list[Quantisation]
    targets: list[Target]
    variants: list[Variant]
    speeds: list[Speed]
    tasks: list[Task]
    checkpoints: list[Checkpoint]
    exports: list[Export]
    messages: list[Message]

    @property
    def models(self) -> list[str]:
        """Names of the models and baselines that were scored, baselines last."""
        names = dict.fromkeys(evaluation["model"] for evaluation in self.evaluations)
        return sorted(names, key=self.is_baseline)

    @property
    def sources(self) -> list[str]:
        """Sources that models were scored on."""
        return list(dict.fromkeys(evaluation["source"] for evaluation in self.evaluations))

    def is_baseline(self, model: str) -> bool:
        """Whether a scored model is no network of this run but a yardstick such as an n-gram."""
        return model != "init" and all(stage.name != model for stage in self.stages)


def summarise(records: Sequence[Record]) -> RunSummary:
    """Add up the records of a run, over all its attempts; the newest record of a thing counts."""
    evaluations: dict[tuple[str, str], Evaluation] = {}
    comparisons: dict[tuple[str, str, str], Comparison] = {}
    checkpoints: dict[tuple[str, int], Checkpoint] = {}
    exports: dict[str, Export] = {}
    messages: list[Message] = []
    started, status, exit_code = None, "running", None
    for record in records:
        match record["kind"]:
            case "run_started":
                started, status, exit_code = record, "running", None
            case "run_ended":
                status, exit_code = record["status"], record["exit_code"]
            case "evaluation":
                evaluations[record["model"], record["source"]] = record
            case "comparison":
                comparisons[record["model"], record["baseline"], record["source"]] = record
            case "checkpoint":
                checkpoints[record["stage"], record["step"]] = record
            case "export":
                exports[record["path"]] = record
            case "message":
                messages.append(record)
    return RunSummary(
        started=started,
        status=status,
        exit_code=exit_code,
        first_time=records[0].get("time", 0.0) if records else 0.0,
        seconds=_seconds_of_run(records),
        stages=_stages(records),
        evaluations=list(evaluations.values()),
        comparisons=list(comparisons.values()),
        candidates=_newest((each for each in records if each["kind"] == "candidate"), _shape_of),
        quantisations=_newest(
            (each for each in records if each["kind"] == "quantisation"), lambda each: (each["stage"], each["part"])
        ),
        targets=_newest((each for each in records if each["kind"] == "target"), lambda each: each["name"]),
        variants=_newest((each for each in records if each["kind"] == "variant"), lambda each: each["model"]),
        speeds=_newest((each for each in records if each["kind"] == "speed"), lambda each: each["model"]),
        tasks=_newest(
            (each for each in records if each["kind"] == "task"),
            lambda each: (each["model"], each["task"], each["metric"]),
        ),
        checkpoints=list(checkpoints.values()),
        exports=list(exports.values()),
        messages=messages,
    )


def _newest(records: Iterable[R], key: Callable[[R], Hashable]) -> list[R]:
    """The last record of each key, in the order in which keys first came."""
    return list({key(record): record for record in records}.values())


def _shape_of(candidate: Candidate) -> Hashable:
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_kv_heads", "num_experts")
    return candidate["stage"], *(candidate[size] for size in sizes)  # type: ignore[literal-required]


def best_of(candidates: Sequence[Candidate]) -> Candidate:
    """The one that was taken: of the smaller shapes, that with the lowest loss."""
    return min(candidates[1:] or candidates, key=lambda each: each["loss"])


def exceeds_noise(comparison: Comparison) -> bool:
    """Whether a gain is more than three standard errors."""
    return comparison["gain"] > 3 * comparison["standard_error"]


def _stages(records: Sequence[Record]) -> list[StageSummary]:
    newest: dict[str, StageStarted] = {}
    for record in records:
        if record["kind"] == "stage_started":
            newest[record["stage"]] = record
    return [_stage(records, started) for started in newest.values()]


def _stage(records: Sequence[Record], started: StageStarted) -> StageSummary:
    name = started["stage"]
    borders = [
        record["kind"]
        for record in records
        if record["kind"] in ("stage_started", "stage_ended") and record.get("stage") == name
    ]
    return StageSummary(
        started=started,
        steps=steps_of(records, name),
        validations=validations_of(records, name),
        seconds=_seconds_of_stage(records, name),
        done=borders[-1] == "stage_ended",
    )


def _seconds_of_stage(records: Sequence[Record], name: str) -> float:
    """Attempts that never wrote their end count up to their last record."""
    total, began, newest = 0.0, None, 0.0
    for record in records:
        if record.get("stage") != name:
            continue
        newest_before, newest = newest, record.get("time", newest)
        if record["kind"] == "stage_started":
            total += newest_before - began if began is not None else 0.0
            began = newest
        elif record["kind"] == "stage_ended":
            total += record["seconds"]
            began = None
    return total + (newest - began if began is not None else 0.0)


def _seconds_of_run(records: Sequence[Record]) -> float:
    total, began, newest = 0.0, None, 0.0
    for record in records:
        newest_before, newest = newest, record.get("time", newest)
        if record["kind"] == "run_started":
            total += newest_before - began if began is not None else 0.0
            began = newest
        elif record["kind"] == "run_ended":
            total += record["seconds"]
            began = None
    return total + (newest - began if began is not None else 0.0)
