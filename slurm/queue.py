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


@dataclass(frozen=True, kw_only=True, slots=True)
class Submitted:
    """The newest job of a run, as kept in its directory.

    Attributes:
        job: its number, `N_INDEX` for one of an array.
    """

    job: str

    def write(self, run: Path) -> None:
        """Remember it."""
        (run / FILES / "job.json").write_text(json.dumps(asdict(self)) + "\n")


def submitted(run: Path) -> Submitted | None:
    """The newest job of a run, or None if it never had one."""
    file = run / FILES / "job.json"
    return Submitted(**json.loads(file.read_text())) if file.exists() else None


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
    """The job of a run that waits or runs, if there is one.

    Raises:
        UserError: Slurm cannot be asked.
    """
    last = submitted(run)
    facts = job_facts(last.job) if last is not None else None
    return last.job if last is not None and facts is not None and facts["JobState"] not in ENDED else None
