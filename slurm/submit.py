"""Writing a run's jobs and handing them to Slurm; those of a sweep become an array."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from conf.errors import UserError
from slurm.queue import Submitted, ask, is_in_queue
from slurm.script import FILES, SCRIPTS, Job, script
from slurm.topology import natural

SUBMIT = ("sbatch", "--parsable")
"""Prints JOB or JOB;CLUSTER."""


def write_scripts(jobs: Sequence[Job]) -> list[Path]:
    """Write the batch scripts of a run's jobs in place of those it had; returns their paths, in order."""
    files = [job.file for job in jobs]
    for run in jobs[0].runs:
        (run / FILES).mkdir(exist_ok=True)
    for old in set(scripts_of(jobs[0].runs[0])) - set(files):
        old.unlink()
    for job, file in zip(jobs, files, strict=True):
        file.write_text(script(job))
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return files


def scripts_of(run: Path) -> list[Path]:
    """The batch scripts of a run, in the order its jobs follow one another."""
    return sorted((run / FILES).glob(SCRIPTS), key=lambda file: natural(file.stem))


def submit(chains: Sequence[Sequence[Job]]) -> list[list[str]]:
    """Submit the jobs of some runs, each run's one after another; returns the job numbers of each run.

    Runs that ask for the same nodes become an array, or arrays one after another.

    Raises:
        UserError: a run is in the queue already, or Slurm refuses, in its own words; then nothing was submitted for it.
    """
    for jobs in chains:
        require_not_queued(jobs[0].runs[0])
    asked = [[replace(job, runs=()) for job in jobs] for jobs in chains]
    if len(chains) > 1 and all(each == asked[0] for each in asked):
        runs = tuple(jobs[0].runs[0] for jobs in chains)
        arrays = submit_files(write_scripts([replace(job, runs=runs) for job in chains[0]]), after="aftercorr")
        numbers = [[f"{array}_{index}" for array in arrays] for index in range(len(chains))]
    else:
        numbers = [submit_files(write_scripts(jobs)) for jobs in chains]
    for jobs, own in zip(chains, numbers, strict=True):
        Submitted(jobs=tuple(own)).write(jobs[0].runs[0])
    return numbers


def submit_files(files: Sequence[Path], *, after: str = "afterok") -> list[str]:
    """Hand scripts to sbatch, each to start when the one before has ended well; returns the job numbers.

    Args:
        files: in order.
        after: the kind of dependency; `aftercorr` has each job of an array wait for its own of the one before.

    Raises:
        UserError: sbatch is missing or refuses; what was submitted before is taken back.
    """
    # A job submitted from within another must not inherit what Slurm told that one.
    environment = {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))
    }
    numbers: list[str] = []
    for file in files:
        waiting = [f"--dependency={after}:{numbers[-1]}"] if numbers else []
        try:
            said = ask(*SUBMIT, *waiting, str(file), environment=environment)
        except UserError:
            if numbers:
                ask("scancel", *numbers)
            raise
        numbers.append(said.strip().partition(";")[0])
    return numbers


def require_not_queued(run: Path) -> None:
    """A run is worked on by one job at a time.

    Raises:
        UserError: it has one, or Slurm cannot be asked.
    """
    if (job := is_in_queue(run)) is not None:
        raise UserError(
            f"job {job} of {run.name} is still in the queue; a run has one job at a time. "
            f"Follow it with python -m slurm status {run}, or stop it first with python -m slurm stop {run}."
        )
