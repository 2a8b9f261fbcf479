"""Predictions for CSV files of published measurements."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from parallel.plan.cases import Case, Row, case_of
from parallel.plan.layout import Layout
from parallel.plan.memory import GIB, memory
from parallel.plan.throughput import step_time

COLUMNS = (
    "predicted_tokens_per_s_per_gpu",
    "predicted_peak_gib",
    "predicted_allocated_gib",
    "predicted_worst_stage_peak_gib",
    "predicted_worst_stage_allocated_gib",
    "reason",
)
"""`predicted_peak_gib` and `predicted_allocated_gib` are of the last pipeline stage, where Megatron's own tests read
theirs, unless `mem_metric` says that the row's are the maximum over ranks; the worst-stage columns always are that.
Allocated is between steps. Peak is of tensors, or of what the allocator reserves where `mem_metric` says so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """GiB and tokens/s of one GPU."""

    layout: Layout
    """The one predicted: as the row says, completed where it leaves something open."""
    tokens_per_s_per_gpu: float
    peak_gib: float
    allocated_gib: float
    worst_peak_gib: float
    worst_allocated_gib: float


def predict(case: Case) -> Prediction:
    """Throughput and memory of an understood row: of the fastest layout that agrees with it."""
    timed = [(step_time(case.shape, layout, case.gpu).tokens_per_s_per_gpu, layout) for layout in case.layouts]
    rate, layout = max(timed, key=lambda pair: pair[0])
    stages = memory(case.shape, layout)
    peaks = [(stage.reserved if case.is_reserved else stage.peak) / GIB for stage in stages]
    allocated = [stage.allocated / GIB for stage in stages]
    return Prediction(
        layout=layout,
        tokens_per_s_per_gpu=rate,
        peak_gib=max(peaks) if case.is_worst_rank else peaks[-1],
        allocated_gib=max(allocated) if case.is_worst_rank else allocated[-1],
        worst_peak_gib=max(peaks),
        worst_allocated_gib=max(allocated),
    )


def columns_of(row: Row) -> dict[str, str]:
    """The prediction columns of a row: numbers, or the reason why there are none."""
    try:
        found = predict(case_of(row))
    except ValueError as error:
        return {**dict.fromkeys(COLUMNS, ""), "reason": str(error)}
    values = (
        found.tokens_per_s_per_gpu,
        found.peak_gib,
        found.allocated_gib,
        found.worst_peak_gib,
        found.worst_allocated_gib,
    )
    return dict(zip(COLUMNS, [f"{value:.6g}" for value in values] + [""], strict=True))


def predict_file(source: Path, target: Path) -> tuple[int, int]:
    """Write the rows of `source` to `target` with the prediction columns; how many have numbers, of how many."""
    with source.open(newline="") as file:
        reader = csv.DictReader(file)
        names = [name for name in reader.fieldnames or () if name not in COLUMNS]
        rows = list(reader)
    predicted = [columns_of(row) for row in rows]
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*names, *COLUMNS], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, **columns} for row, columns in zip(rows, predicted, strict=True))
    return sum(not columns["reason"] for columns in predicted), len(rows)
