"""Loss curves of the precisions on real text: `python -m bench.precision [OVERRIDE...]`.

The first stage of a recipe is trained in bf16 and in fp8 from equal weights on equal batches, by the training loop, in
one process. Prints the mean losses of every fifty steps side by side, and what fp8 is off by. On a CPU the products of
fp8 are torch's own for float8, so the numbers are those of the format, and the time says nothing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.overhead import ONE_RANK, run
from conf import load
from parallel import groups
from parallel.mesh import Mesh
from recipes.check import resolve
from recipes.machine import find_machine

PRECISIONS = ("bf16", "fp8", "fp8_rowwise")
WINDOW_STEPS = 50


def means(losses: Sequence[float]) -> list[float]:
    """Mean of every whole window."""
    return [
        statistics.fmean(losses[start : start + WINDOW_STEPS])
        for start in range(0, len(losses) - WINDOW_STEPS + 1, WINDOW_STEPS)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.precision", description=__doc__)
    parser.add_argument("override", nargs="*", default=["recipe=foundation"])
    parser.add_argument("--steps", type=int, default=500)
    given = parser.parse_args(arguments)
    groups.open_world(groups.host_store(), rank=0, world_size=1)
    groups.enter_mesh(Mesh())
    torch.set_num_threads(1)
    curves = {}
    with tempfile.TemporaryDirectory() as directory:
        for precision in PRECISIONS:
            overrides = [*given.override, *ONE_RANK, f"engine.precision={precision}"]
            config = resolve(load.compose(overrides), find_machine())
            curves[precision] = means(run(config, given.steps, Path(directory)).losses)
    print("| to step | " + " | ".join(f"{each} | off %" if each != "bf16" else each for each in PRECISIONS) + " |")
    for place, exact in enumerate(curves["bf16"]):
        cells = [f"{exact:.4f}"]
        for each in PRECISIONS[1:]:
            cells += [f"{curves[each][place]:.4f}", f"{100 * (curves[each][place] / exact - 1):+.3f}"]
        print(f"| {(place + 1) * WINDOW_STEPS} | " + " | ".join(cells) + " |")
    for each in PRECISIONS[1:]:
        worst = max(abs(mine / exact - 1) for mine, exact in zip(curves[each], curves["bf16"], strict=True))
        print(f"{each}: the worst window is {100 * worst:.3f} % off bf16")
    groups.shut_down()


if __name__ == "__main__":
    main()
