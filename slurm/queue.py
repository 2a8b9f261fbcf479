"""What Slurm says: its commands, run with their own words kept for the user."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from conf.errors import UserError
from slurm.script import FILES

SECONDS = 60
ENDED = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED"}
)
"""States a job does not leave by itself."""
FORGOTTEN = "no longer known to Slurm"
KEPT = "job.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Submitted:
    """What a run was last submitted as, kept in its directory.

    Attributes:
        jobs: numbers in the order they run, `N_INDEX` for one of an array.
    """

    jobs: tuple[str, ...]

    def write(self, run: Path) -> None:
        """Remember it."""
        (run / FILES / KEPT).write_text(json.dumps(asdict(self)) + "\n")


@dataclass(frozen=True, kw_only=True, slots=True)
class QueuedJob:
    """A job of a run, and what Slurm says of it; None where it has forgotten it."""

    number: str
    facts: Mapping[str, str] | None

    @property
    def state(self) -> str:
        """Slurm's word for it."""
        return self.facts["JobState"] if self.facts is not None else FORGOTTEN

    @property
    def has_ended(self) -> bool:
        """Whether nothing more comes of it."""
        return self.facts is None or self.state in ENDED


def jobs_of(run: Path) -> list[QueuedJob]:
    """The jobs a run was last submitted as, in the order they run; none if it never was.

    Raises:
        UserError: Slurm cannot be asked.
    """
    file = run / FILES / KEPT
    if not file.exists():
        return []
    return [QueuedJob(number=number, facts=job_facts(number)) for number in json.loads(file.read_text())["jobs"]]


def ask(*command: str, environment: Mapping[str, str] | None = None) -> str:
    """Output of a Slurm command, run in this process's environment or another.

    Raises:
        UserError: it is not installed, does not answer, or refuses; with its own words.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment, check=False)
    except FileNotFoundError:
        raise UserError(
            f"there is no {command[0]} on this machine, so it cannot submit to Slurm. Run this on a login node of the "
            "cluster, or load its Slurm module; action=dry_run writes the job without submitting it."
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not answer within {SECONDS} s; is the Slurm controller up?") from None
    if done.returncode != 0:
        said = "\n".join(f"  {line}" for line in (done.stderr or done.stdout).strip().splitlines())
        raise UserError(f"{command[0]} refused:\n{said}")
    return done.stdout


def job_facts(job: str) -> Mapping[str, str] | None:
    """What `scontrol show job` says (JobState, Reason, NodeList, ...), or None where Slurm has forgotten the job.

    Raises:
        UserError: Slurm cannot be asked.
    """
    try:
        text = ask("scontrol", "show", "job", "--oneliner", job)
    except UserError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    return dict(re.findall(r"(\S+?)=(\S*)", text.splitlines()[0]))


def is_in_queue(run: Path) -> str | None:
    """The job of a run that runs or is the next to, if there is one.

    Raises:
        UserError: Slurm cannot be asked.
    """
    return next((job.number for job in jobs_of(run) if not job.has_ended), None)
