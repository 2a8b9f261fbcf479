"""Predict published measurements row by row, or search the best layouts of a public model.

python -m parallel.plan rows IN.csv OUT.csv
python -m parallel.plan search --model Llama3-70B --gpu H200 --gpus 2048 --batch 2048 --sequence 8192
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from parallel.plan.hardware import gpu_named
from parallel.plan.memory import GIB, StageMemory
from parallel.plan.rows import predict_file
from parallel.plan.search import Task, search, smallest_cluster, why
from parallel.plan.shapes import PUBLIC_MODELS, public_model

LISTED = 8
"""Layouts of the front that are printed."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m parallel.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    rows = commands.add_parser("rows", help="predict each row of a CSV file of measurements")
    rows.add_argument("source", type=Path, metavar="IN.csv")
    rows.add_argument("target", type=Path, metavar="OUT.csv")
    rows.set_defaults(run=predict_rows)
    best = commands.add_parser("search", help="the best layouts of a public model")
    best.add_argument("--model", required=True, help="a public model, such as Llama3-70B")
    best.add_argument("--gpu", required=True)
    best.add_argument("--gpus", required=True, type=int)
    best.add_argument("--batch", required=True, type=int, help="sequences a step")
    best.add_argument("--sequence", required=True, type=int, help="tokens a sequence")
    best.add_argument("--precision", choices=("bf16", "fp8"), nargs="+", default=["bf16"])
    best.set_defaults(run=print_search)
    chosen = parser.parse_args(arguments)
    try:
        return int(chosen.run(chosen))
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
    except ValueError as error:
        print(error, file=sys.stderr)
    return 2


def predict_rows(chosen: argparse.Namespace) -> int:
    """Predict the rows of a file."""
    predicted, total = predict_file(chosen.source, chosen.target)
    print(f"{predicted} of {total} rows predicted, written to {chosen.target}")
    return 0


def print_search(chosen: argparse.Namespace) -> int:
    """Print the front of time and memory.

    Raises:
        ValueError: the model or the GPU is not known.
    """
    model = public_model(chosen.model)
    if model is None:
        raise ValueError(f"{chosen.model!r} is not a public model known here; known are {', '.join(PUBLIC_MODELS)}")
    task = Task(
        shape=model.shape(),
        gpu=gpu_named(chosen.gpu),
        num_gpus=chosen.gpus,
        global_batch=chosen.batch,
        sequence=chosen.sequence,
        precisions=tuple(chosen.precision),
    )
    started = time.perf_counter()
    found = search(task)
    print(f"{found.considered} layouts in {time.perf_counter() - started:.2f} s")
    if not found.front:
        print(_why_nothing_fits(task, found.leanest), file=sys.stderr)
        return 1
    best = found.front[0]
    for candidate in found.front[:LISTED]:
        rate = f"{candidate.step.tokens_per_s_per_gpu:,.0f} tokens/s/GPU"
        told = "" if candidate is best else f": {why(best, candidate)}"
        print(f"{candidate.step.seconds:8.3f} s  {rate}  {candidate.worst.needed / GIB:5.1f} GiB  {candidate}{told}")
    if found.runner_up is not None:
        print(f"runner-up: {found.runner_up}: {why(best, found.runner_up)}")
    print(f"MFU of the fastest {best.step.mfu:.1%} (dense bf16 peak, causal attention counted half, no recomputation)")
    return 0


def _why_nothing_fits(task: Task, leanest: StageMemory | None) -> str:
    if leanest is None:
        return (
            f"no layout divides {task.num_gpus} GPUs, a batch of {task.global_batch} sequences and the model: the "
            "batch must be a multiple of the data ranks, num_gpus / (tensor x context x pipeline)"
        )
    smallest = smallest_cluster(task)
    remedy = f"the smallest that fits is {smallest} GPUs" if smallest else "no number of GPUs fits this batch"
    return (
        f"nothing fits: the leanest layout needs {leanest.needed / GIB:.1f} GiB of a GPU, and {task.gpu.name} has "
        f"{task.gpu.memory_bytes / GIB:.1f}; {remedy}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
