"""The cost model against public measurements, and the fit of its constants.

    python -m bench.plan [PERF.csv [MEMORY.csv]] [--fit]

Prints errors by kind of row, and errors on each source with the constants refitted without it: the second table is
what to expect on rows of a source the model has not seen. `--fit` fits the constants anew; they live in
`parallel/plan/constants.py`.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from parallel.plan.cases import Case, Row, case_of
from parallel.plan.constants import FITTED, Constants
from parallel.plan.rows import predict
from parallel.plan.throughput import step_time

HERE = Path(__file__).parent / "planner"
Array = NDArray[np.float64]

# What each constant is believed to be before any row is seen, and by what factor that may be wrong (one standard
# deviation). Keeps what the rows do not determine near what is physical.
BELIEFS: dict[str, tuple[float, float]] = {
    "gemm_share": (0.90, 1.1),
    "fp8_gemm_share": (0.85, 1.15),
    "attention_share": (0.85, 1.15),
    "attention_ramp_tokens": (512, 2.0),
    "fused_traffic": (1.3, 1.4),
    "eager_traffic": (2.0, 1.4),
    "gemm_traffic": (0.7, 1.5),
    "layer_seconds": (1e-4, 2.0),
    "exposed_node": (0.6, 1.5),
    "exposed_data": (0.2, 1.6),
    "exposed_shards": (0.4, 1.6),
    "hop_seconds": (2e-6, 1.5),
    "step_seconds": (0.02, 2.0),
}
ROW_NOISE = 0.05
"""Releases move the same layout by as much."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A row of throughput, understood."""

    source: str
    model: str
    kind: str
    precision: str
    case: Case
    tokens_per_s: float

    def log_error(self, constants: Constants) -> float:
        """Logarithm of predicted over measured."""
        rates = (
            step_time(self.case.shape, layout, self.case.gpu, constants).tokens_per_s_per_gpu
            for layout in self.case.layouts
        )
        return math.log(max(rates) / self.tokens_per_s)


def kind_of(row: Row, case: Case) -> str:
    """The group a row's error is reported in."""
    layout = case.layouts[0]
    if case.shape.experts > 1:
        return "mixture of experts"
    if layout.sharding == "zero3":
        return "FSDP"
    return f"Megatron dense {layout.precision}"


def read(path: Path) -> list[Row]:
    """Rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def measured(rows: Sequence[Row]) -> list[Measured]:
    """The rows that can be modelled; the others are named."""
    found = []
    for row in rows:
        try:
            case = case_of(row)
        except ValueError as error:
            print(f"left out: {row['source']}, {row['model']}: {error}")
            continue
        rate = float(row["tokens_per_s_per_gpu"])
        found.append(Measured(row["source"], row["model"], kind_of(row, case), row["precision"], case, rate))
    return found


def fit(rows: Sequence[Measured], rounds: int = 12) -> Constants:
    """Constants of the least squared logarithmic errors, each constant held by what is believed of it.

    Rows that differ in the number of GPUs only say the same thing many times, so a group of them counts as the square
    root of its size.
    """
    names = list(BELIEFS)
    centre = np.log([BELIEFS[name][0] for name in names])
    width = np.log([BELIEFS[name][1] for name in names])
    sizes = Counter((row.source, row.model, row.precision) for row in rows)
    weights = np.array([sizes[row.source, row.model, row.precision] ** -0.25 for row in rows]) / ROW_NOISE

    def residuals(point: Array) -> Array:
        constants = Constants(**dict(zip(names, np.exp(point).tolist(), strict=True)))
        errors = np.array([row.log_error(constants) for row in rows])
        # Huber: a row far off is a row that says something else than it seems to.
        scale = np.where(np.abs(errors) > 0.12, np.sqrt(0.12 / np.maximum(np.abs(errors), 0.12)), 1.0)
        return np.concatenate([errors * scale * weights, (point - centre) / width])

    point = centre.copy()
    damping = 1.0
    best = residuals(point)
    for _ in range(rounds):
        columns = [(residuals(point + 1e-3 * unit) - best) / 1e-3 for unit in np.eye(len(names))]
        jacobian = np.stack(columns, axis=1)
        normal = jacobian.T @ jacobian
        while damping < 1e6:
            step = np.linalg.solve(normal + damping * np.eye(len(names)), -jacobian.T @ best)
            tried = residuals(point + step)
            if tried @ tried < best @ best:
                break
            damping *= 4
        else:
            break
        gained = best @ best - tried @ tried
        point, best, damping = point + step, tried, damping / 4
        if gained < 1e-4 * (best @ best):
            break
    return Constants(**{name: float(f"{value:.3g}") for name, value in zip(names, np.exp(point), strict=True)})


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors of a group of rows, in per cent."""

    rows: int
    mean_absolute: float
    bias: float
    worst: float

    def __str__(self) -> str:
        return f"{self.rows:5d} {self.mean_absolute:8.1f} {self.bias:+8.1f} {self.worst:+8.1f}"


def errors_of(ratios: Sequence[float]) -> Errors:
    """Errors of predicted over measured."""
    off = 100 * (np.asarray(ratios) - 1)
    return Errors(len(off), float(np.abs(off).mean()), float(off.mean()), float(off[np.abs(off).argmax()]))


def by_group(rows: Sequence[Measured], ratios: Sequence[float], name: Callable[[Measured], str]) -> dict[str, Errors]:
    """Errors by group, in order of appearance."""
    groups = dict.fromkeys(map(name, rows))
    return {
        group: errors_of([ratio for row, ratio in zip(rows, ratios, strict=True) if name(row) == group])
        for group in groups
    }


def print_table(title: str, table: dict[str, Errors]) -> None:
    """A table of errors."""
    print(f"\n{title:52}  rows  mean|e|     bias    worst   (%)")
    for name, errors in table.items():
        print(f"{name[:52]:52} {errors}")


def report_throughput(rows: list[Measured], constants: Constants) -> None:
    """Errors with these constants, and on each source with constants fitted without it."""
    ratios = [math.exp(row.log_error(constants)) for row in rows]
    table = by_group(rows, ratios, lambda row: row.kind)
    dense = [ratio for row, ratio in zip(rows, ratios, strict=True) if row.kind.startswith("Megatron dense")]
    print_table(
        "tokens/s/GPU",
        {**table, "Megatron dense, both": errors_of(dense), "all": errors_of(ratios)},
    )
    print_table("by source", by_group(rows, ratios, lambda row: row.source))
    ordered, unseen = left_out(rows, lambda row: row.source)
    print_table(
        "leave one source out: the source left out",
        {**by_group(ordered, unseen, lambda row: row.source), "all": errors_of(unseen)},
    )
    print_table("leave one source out, by kind", by_group(ordered, unseen, lambda row: row.kind))
    ordered, unseen = left_out(rows, lambda row: (row.source, row.model))
    print_table(
        "leave one model of one source out, by kind",
        {**by_group(ordered, unseen, lambda row: row.kind), "all": errors_of(unseen)},
    )


def left_out(rows: Sequence[Measured], name: Callable[[Measured], Hashable]) -> tuple[list[Measured], list[float]]:
    """Rows group by group, and their predicted over measured with constants fitted to all other groups."""
    ordered: list[Measured] = []
    ratios: list[float] = []
    for group in dict.fromkeys(map(name, rows)):
        others = fit([row for row in rows if name(row) != group])
        left = [row for row in rows if name(row) == group]
        ordered += left
        ratios += [math.exp(row.log_error(others)) for row in left]
    return ordered, ratios


def report_memory(rows: Sequence[Row]) -> None:
    """Errors of memory; nothing in it is fitted row by row."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        try:
            found = predict(case_of(row))
        except ValueError as error:
            print(f"left out: {row['source']}, {row['model']}: {error}")
            continue
        pairs = {
            "peak": (row["mem_peak_gib"], found.peak_gib),
            "allocated": (row["mem_allocated_gib"], found.allocated_gib),
        }
        for name, (stated, predicted) in pairs.items():
            if stated:
                ratio = predicted / float(stated)
                ratios.setdefault(f"{name}, {row['source']}", []).append(ratio)
                ratios.setdefault(f"{name}, all", []).append(ratio)
    print_table("memory", {name: errors_of(values) for name, values in sorted(ratios.items())})


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("throughput", nargs="?", type=Path, default=HERE / "perf_calibration.csv", metavar="PERF.csv")
    parser.add_argument("memory", nargs="?", type=Path, default=HERE / "memory_calibration.csv", metavar="MEMORY.csv")
    parser.add_argument("--fit", action="store_true", help="fit the constants anew and use them")
    chosen = parser.parse_args()
    rows = measured(read(chosen.throughput))
    constants = FITTED
    if chosen.fit:
        constants = fit(rows)
        print("\n".join(f"{name}: {value:.3g}" for name, value in asdict(constants).items()))
    report_throughput(rows, constants)
    report_memory(read(chosen.memory))


if __name__ == "__main__":
    main()
