"""`python -m slurm status|logs|stop|submit RUN`: what becomes of a run that was given to Slurm."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from conf.errors import UserError
from slurm.queue import ENDED, Submitted, ask, job_facts, submitted
from slurm.script import FILES, OUTPUT, SCRIPT
from slurm.submit import require_not_queued, submit_file

FOLLOW_SECONDS = 1.0
TAIL_BYTES = 2**18
NO_OUTPUT = "0:53"
"""Exit code of a job whose output file could not be opened on its first node."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Follow, stop or submit a run."""
    parser = argparse.ArgumentParser(prog="python -m slurm", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("status", "how its job stands, and how far the run has come"),
        ("logs", "what the job, or one of its ranks, has written"),
        ("stop", "save and stop, or leave the queue"),
        ("submit", "hand in a job that action=dry_run has written"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("run", type=Path)
        if name == "logs":
            command.add_argument("--rank", type=int, help="of this rank instead of the job")
            command.add_argument("--lines", type=int, default=50, help="the last so many")
            command.add_argument("-f", "--follow", action="store_true", help="go on until the job has ended")
    given = parser.parse_args(arguments)
    run = given.run.resolve()
    try:
        if not (run / "config.json").exists():
            raise UserError(f"{run} is not a run directory (it has no config.json)")
        match given.command:
            case "status":
                print(status(run))
            case "logs":
                logs(run, rank=given.rank, lines=given.lines, follow=given.follow)
            case "stop":
                print(stop(run))
            case "submit":
                print(submit(run))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def status(run: Path) -> str:
    """The job's state in Slurm and the run's own, a fact a line.

    Raises:
        UserError: Slurm cannot be asked.
    """
    lines = {"run": run.name}
    last = submitted(run)
    if last is None:
        lines["job"] = "never submitted"
    else:
        lines["job"] = last.job
        facts = job_facts(last.job)
        if facts is None:
            lines["state"] = "no longer known to Slurm"
        else:
            reason = facts.get("Reason", "None")
            lines["state"] = facts["JobState"] + (f" ({reason})" if reason != "None" else "")
            for label, field in (("elapsed", "RunTime"), ("time limit", "TimeLimit"), ("queued again", "Restarts")):
                lines[label] = facts.get(field, "")
            if facts.get("ExitCode") == NO_OUTPUT:
                lines["why"] = f"{facts.get('BatchHost', 'its node')} could not write {run / FILES}: is it shared?"
            for label, field in (("nodes", "NodeList"), ("left out", "ExcNodeList"), ("starts", "StartTime")):
                if facts.get(field) not in (None, "", "(null)", "Unknown"):
                    lines[label] = facts[field]
    lines["status"] = _own_status(run) or "not started"
    lines |= _progress(run)
    return "\n".join(f"{label:<14}{value}" for label, value in lines.items())


def logs(run: Path, *, rank: int | None, lines: int, follow: bool) -> None:
    """Print the end of a log, and what is added to it while the job is there.

    Raises:
        UserError: there is no such log.
    """
    file = run / FILES / OUTPUT if rank is None else run / "logs" / f"rank-{rank:05d}.log"
    if not file.exists() and not follow:
        raise UserError(f"there is no {file} yet. python -m slurm status {run} says how the job stands.")
    if not follow:
        subprocess.run(["tail", f"--lines={lines}", str(file)], check=False)
        return
    with subprocess.Popen(["tail", f"--lines={lines}", "--follow=name", "--retry", str(file)]) as tail:
        try:
            while (job := submitted(run)) and (facts := job_facts(job.job)) and facts["JobState"] not in ENDED:
                time.sleep(FOLLOW_SECONDS)
        except KeyboardInterrupt:
            pass
        finally:
            time.sleep(FOLLOW_SECONDS)
            tail.terminate()


def stop(run: Path) -> str:
    """Let a running job save and end, and take a waiting one out of the queue; returns what was done.

    Raises:
        UserError: it has no job, or Slurm refuses.
    """
    last = submitted(run)
    facts = job_facts(last.job) if last is not None else None
    if last is None or facts is None or facts["JobState"] in ENDED:
        raise UserError(f"{run.name} has no job in the queue; there is nothing to stop.")
    if facts["JobState"] == "RUNNING":
        # The batch script passes it on, and does not queue the job again after it.
        ask("scancel", "--batch", "--signal=TERM", last.job)
        return f"job {last.job} saves and ends; follow it with python -m slurm status {run}"
    ask("scancel", last.job)
    return f"job {last.job} was {facts['JobState'].lower()} and has left the queue"


def submit(run: Path) -> str:
    """Submit the job that is written in the run directory.

    Raises:
        UserError: there is none, it is in the queue, or Slurm refuses.
    """
    file = run / FILES / SCRIPT
    if not file.exists():
        raise UserError(f"there is no {file}; python -m train ... action=dry_run writes it.")
    require_not_queued(run)
    job = submit_file(file)
    Submitted(job=job).write(run)
    return f"job {job}; follow it with python -m slurm status {run}"


def _own_status(run: Path) -> str | None:
    file = run / "status.json"
    return str(json.loads(file.read_text())["status"]) if file.exists() else None


def _progress(run: Path) -> dict[str, str]:
    """The newest step of the record, read from its end."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return {}
    with file.open("rb") as stream:
        stream.seek(max(0, os.path.getsize(file) - TAIL_BYTES))
        lines = stream.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        # The first line may be cut off, and the last one still being written.
        with suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and record.get("kind") == "step":
                step = f"step {record['step']} of {record['num_steps']}"
                return {"progress": f"{record['stage']}, {step}, loss {record['loss']:.4f}"}
    return {}


if __name__ == "__main__":
    sys.exit(main())
