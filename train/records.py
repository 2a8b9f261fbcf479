"""Kinds of records in `metrics.jsonl`, and what each holds; `metrics.py` writes and reads them.

Every record has `kind` and `time` (unix seconds). Written by the driver (D) or by rank 0 (R):

    run_started (D)    run, recipe, scale, machine, world_size, mesh, restarts
    stage_started (R)  stage, stage_kind, num_parameters, num_steps, step (first to run, 0-based), tokens_per_step
    step (R)           stage, step (completed steps, 1-based), num_steps, loss, learning_rate, grad_norm, tokens (of the
                       stage so far), step_seconds, tokens_per_second, model_tflops (a rank), mfu (or null),
                       memory_bytes (a rank's peak), metrics {name: mean}
    validation (R)     stage, step, source, loss, standard_error, accuracy, num_tokens
    checkpoint (R)     stage, step, path, num_bytes, seconds_blocked, seconds
    reading (R)        stage, step, storage {requests, bytes, retries, damaged}, tiers {name: {hits, hit_ratio, bytes,
                       seconds, damaged, failures}} of rank 0 since the stage began in this attempt
    evaluation (R/D)   stage, model, source, loss, standard_error, accuracy, accuracy_standard_error, num_tokens,
                       num_documents        (model is a stage's name, `init`, or a baseline such as `bigram`)
    comparison (R/D)   stage, model, baseline, source, gain (nats a token, positive is better), standard_error
    candidate (R)      stage, the shape (num_layers, hidden_size, ffn_hidden_size, num_attention_heads, num_kv_heads,
                       num_experts), num_parameters, num_active_parameters (of a token), size_ratio (to the parent, in
                       what is cut), importance_kept, loss, standard_error (over rows), seconds
                       (the first of a stage is the parent itself)
    quantisation (R)   stage, scheme, part (`layer N` alone, or `all`), cost (nats a token, on calibration text),
                       standard_error (over rows), agreement (share of equal likeliest tokens), kept (not rounded)
    variant (R)        stage, model, num_parameters, weight_bytes (as exported), prefill_tokens_per_second (of scoring
                       all held-out text, all ranks; INT8 is computed in floating point)
    speed (R)          stage, model, device, prompt_tokens, prefill_seconds, decode_seconds (a token; both {low, median,
                       high}: quartiles over rounds) of the exported model in transformers, one row; memory_bytes (of
                       weights, as held), disk_bytes (of weights)
    task               model (exported), task, metric, value, standard_error (over problems), num_problems; written by
                       `python -m recipes.tasks`, after the run
    target (R)         stage, name, model, baseline, source, value, standard_error, limit, met
    export (R)         stage, path, num_bytes
    stage_ended (R)    stage, seconds
    message (D/R)      level (info, warning, error), text
    run_ended (D)      status (finished, stopped, failed), exit_code, seconds

Losses are nats a token, standard errors are over documents. Losses are written with all their digits: two runs that
should be equal can be compared to the last bit. JSON has no NaN or infinity; they are written as `{"float": "nan"}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NotRequired, TypedDict


class RunStarted(TypedDict):
    """A driver began, or began again after a stop."""

    kind: Literal["run_started"]
    time: NotRequired[float]
    run: str
    recipe: str
    scale: str
    machine: str
    world_size: int
    mesh: str
    restarts: int


class StageStarted(TypedDict):
    """A stage began, or began again from a checkpoint."""

    kind: Literal["stage_started"]
    time: NotRequired[float]
    stage: str
    stage_kind: str
    num_parameters: int
    num_steps: int
    step: int
    tokens_per_step: int


class Step(TypedDict):
    """One optimizer step."""

    kind: Literal["step"]
    time: NotRequired[float]
    stage: str
    step: int
    num_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    step_seconds: float
    tokens_per_second: float
    model_tflops: float
    mfu: float | None
    memory_bytes: int
    metrics: Mapping[str, float]


class Validation(TypedDict):
    """Loss on the held-out text of one source."""

    kind: Literal["validation"]
    time: NotRequired[float]
    stage: str
    step: int
    source: str
    loss: float
    standard_error: float
    accuracy: float
    num_tokens: int


class Checkpoint(TypedDict):
    """A checkpoint that is on disk and verified."""

    kind: Literal["checkpoint"]
    time: NotRequired[float]
    stage: str
    step: int
    path: str
    num_bytes: int
    seconds_blocked: float
    seconds: float


class Evaluation(TypedDict):
    """One model scored on one source."""

    kind: Literal["evaluation"]
    time: NotRequired[float]
    stage: str
    model: str
    source: str
    loss: float
    standard_error: float
    accuracy: float
    accuracy_standard_error: float
    num_tokens: int
    num_documents: int


class Comparison(TypedDict):
    """How much better one model is than another on the same documents."""

    kind: Literal["comparison"]
    time: NotRequired[float]
    stage: str
    model: str
    baseline: str
    source: str
    gain: float
    standard_error: float


class Candidate(TypedDict):
    """A shape that a pruning stage tried, before any recovery."""

    kind: Literal["candidate"]
    time: NotRequired[float]
    stage: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_kv_heads: int
    num_experts: int
    num_parameters: int
    num_active_parameters: int
    size_ratio: float
    importance_kept: float
    loss: float
    standard_error: float
    seconds: float


class Quantisation(TypedDict):
    """What rounding a part of a model to INT8 costs."""

    kind: Literal["quantisation"]
    time: NotRequired[float]
    stage: str
    scheme: str
    part: str
    cost: float
    standard_error: float
    agreement: float
    kept: bool


class Variant(TypedDict):
    """How large a scored model is, and how fast it reads."""

    kind: Literal["variant"]
    time: NotRequired[float]
    stage: str
    model: str
    num_parameters: int
    weight_bytes: int
    prefill_tokens_per_second: float


class Speed(TypedDict):
    """How fast an exported model reads and writes in transformers."""

    kind: Literal["speed"]
    time: NotRequired[float]
    stage: str
    model: str
    device: str
    prompt_tokens: int
    prefill_seconds: Mapping[str, float]
    decode_seconds: Mapping[str, float]
    memory_bytes: int
    disk_bytes: int


class Task(TypedDict):
    """How an exported model did at a task."""

    kind: Literal["task"]
    time: NotRequired[float]
    model: str
    task: str
    metric: str
    value: float
    standard_error: float
    num_problems: int


class Target(TypedDict):
    """What was promised, and what was reached."""

    kind: Literal["target"]
    time: NotRequired[float]
    stage: str
    name: str
    model: str
    baseline: str
    source: str
    value: float
    standard_error: float
    limit: float
    met: bool


class Export(TypedDict):
    """A model directory was written."""

    kind: Literal["export"]
    time: NotRequired[float]
    stage: str
    path: str
    num_bytes: int


class Reading(TypedDict):
    """What rank 0 read for training, from storage and from each tier."""

    kind: Literal["reading"]
    time: NotRequired[float]
    stage: str
    step: int
    storage: Mapping[str, float]
    tiers: Mapping[str, Mapping[str, float]]


class StageEnded(TypedDict):
    """A stage came to its end; one that was stopped or failed has none."""

    kind: Literal["stage_ended"]
    time: NotRequired[float]
    stage: str
    seconds: float


class Message(TypedDict):
    """Something a person should read."""

    kind: Literal["message"]
    time: NotRequired[float]
    level: Literal["info", "warning", "error"]
    text: str


class RunEnded(TypedDict):
    """The driver ended; no further record but messages until it is started again."""

    kind: Literal["run_ended"]
    time: NotRequired[float]
    status: Literal["finished", "stopped", "failed"]
    exit_code: int
    seconds: float


Record = (
    RunStarted
    | StageStarted
    | Step
    | Validation
    | Checkpoint
    | Reading
    | Evaluation
    | Comparison
    | Candidate
    | Quantisation
    | Speed
    | Task
    | Target
    | Variant
    | Export
    | StageEnded
    | Message
    | RunEnded
)
