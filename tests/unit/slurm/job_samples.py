"""Jobs for the tests of the script."""

from dataclasses import replace
from functools import cache
from pathlib import Path

from conf import load
from slurm.script import Job

RUN = Path("/lustre/runs/foundation-20260131-142501-3f9a")


@cache
def cluster(*overrides):
    return load.compose(["recipe=foundation", "cluster=h200_slurm", *overrides]).cluster


def job(*overrides, runs=(RUN,), **values):
    """A job of the full-size foundation; `values` are of `cluster.slurm`."""
    place = cluster(*overrides)
    return Job(
        runs=runs,
        cluster=replace(place, slurm=replace(place.slurm, **values)),
        driver="recipes.job",
        directory=Path("/home/ada/frontier"),
        python="/home/ada/venv/bin/python",
    )
