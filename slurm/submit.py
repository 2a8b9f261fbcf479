"""Writing a run's job and handing it to Slurm; several jobs of a sweep become one array."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from conf.errors import UserError
from slurm.queue import Submitted, ask, is_in_queue
from slurm.script import FILES, SCRIPT, Job, script

SUBMIT = ("sbatch", "--parsable")
"""Prints JOB or JOB;CLUSTER."""


def write_script(job: Job) -> Path:
    """Write the batch script into the first run of a job; returns its path."""
    for run in job.runs:
        (run / FILES).mkdir(exist_ok=True)
    file = job.runs[0] / FILES / SCRIPT
    file.write_text(script(job))
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def submit(jobs: Sequence[Job]) -> list[str]:
    """Submit jobs of one run each; returns the job number of each. Those that ask for the same nodes become an array.

    Raises:
        UserError: a run is in the queue already, or Slurm refuses, in its own words.
    """
    for job in jobs:
        require_not_queued(job.runs[0])
    if len(jobs) > 1 and all(replace(job, runs=jobs[0].runs) == jobs[0] for job in jobs):
        together = replace(jobs[0], runs=tuple(run for job in jobs for run in job.runs))
        number = submit_file(write_script(together))
        numbers = [f"{number}_{index}" for index in range(len(jobs))]
    else:
        numbers = [submit_file(write_script(job)) for job in jobs]
    for job, number in zip(jobs, numbers, strict=True):
        Submitted(job=number).write(job.runs[0])
    return numbers


def submit_file(file: Path) -> str:
    """Hand a script to sbatch; returns the job number.

    Raises:
        UserError: sbatch is missing or refuses.
    """
    # A job submitted from within another must not inherit what Slurm told that one.
    environment = {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))
    }
    return ask(*SUBMIT, str(file), environment=environment).strip().partition(";")[0]


def require_not_queued(run: Path) -> None:
    """A run has one job at a time.

    Raises:
        UserError: it has one, or Slurm cannot be asked.
    """
    if (job := is_in_queue(run)) is not None:
        raise UserError(
            f"job {job} of {run.name} is still in the queue; a run has one job at a time. "
            f"Follow it with python -m slurm status {run}, or stop it first with python -m slurm stop {run}."
        )
