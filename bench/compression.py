"""Smaller models against all their controls, over seeds: `python -m bench.compression --seeds 1 2`.

Runs the module recipe with `controls=true` once a seed, each from its own foundation, in an empty directory, and prints
means over seeds: accuracy next to the control it is fair to compare with, and gains in nats.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

from train.metrics import read


def run(directory: Path, recipe: str, seed: int, overrides: list[str]) -> Path:
    """One run of the recipe; returns its record."""
    command = [sys.executable, "-m", "train", f"recipe={recipe}", "controls=true", f"seed={seed}", *overrides]
    subprocess.run([*command, f"runs_dir={directory}", "tracking.mode=disabled"], check=True)
    (record,) = directory.glob(f"{recipe}-*/metrics.jsonl")
    return record


def spread(values: list[float]) -> str:
    """Mean, and standard deviation over seeds where there are several."""
    return f"{fmean(values):.4f}" + (f" +- {stdev(values):.4f}" if len(values) > 1 else "")


def main() -> int:
    """Run, add up, print."""
    parser = argparse.ArgumentParser(prog="python -m bench.compression", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--recipe", default="business_module")
    parser.add_argument("override", nargs="*")
    given = parser.parse_args()
    targets: dict[str, list[float]] = defaultdict(list)
    gains: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    errors: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for seed in given.seeds:
        with tempfile.TemporaryDirectory() as directory:
            for each in read(run(Path(directory), given.recipe, seed, given.override)):
                if each["kind"] == "target":
                    targets[f"{each['name']} ({each['model']} / {each['baseline']})"].append(each["value"])
                elif each["kind"] == "comparison":
                    key = (each["model"], each["baseline"], each["source"])
                    gains[key].append(each["gain"])
                    errors[key].append(each["standard_error"])
    print(f"seeds {given.seeds}")
    for name, values in targets.items():
        print(f"{name}: {spread(values)}")
    print("gain in nats a token, mean and deviation over seeds; then the mean standard error over documents")
    for (model, baseline, source), values in gains.items():
        print(f"{model} over {baseline}, {source}: {spread(values)} ({fmean(errors[model, baseline, source]):.4f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
