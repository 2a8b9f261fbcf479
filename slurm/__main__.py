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
from slurm.queue import QueuedJob, Submitted, ask, is_in_queue, jobs_of
from slurm.script import FILES, OUTPUT
from slurm.submit import require_not_queued, scripts_of, submit_files

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
    """The state of its jobs in Slurm and the run's own, a fact a line.

    Raises:
        UserError: Slurm cannot be asked.
    """
    lines = {"run": run.name}
    jobs = jobs_of(run)
    if not jobs:
        lines["job"] = "never submitted"
    else:
        job = _current(jobs)
        lines["job"] = job.number
        if len(jobs) > 1:
            lines["of the jobs"] = ", then ".join(f"{each.number} {each.state}" for each in jobs)
        facts = job.facts or {}
        reason = facts.get("Reason", "None")
        lines["state"] = job.state + (f" ({reason})" if reason != "None" else "")
        for label, field in (("elapsed", "RunTime"), ("time limit", "TimeLimit"), ("queued again", "Restarts")):
            if field in facts:
                lines[label] = facts[field]
        if facts.get("ExitCode") == NO_OUTPUT:
            lines["why"] = f"{facts.get('BatchHost', 'its node')} could not write {run / FILES}: is it shared?"
        for label, field in (("nodes", "NodeList"), ("left out", "ExcNodeList"), ("starts", "StartTime")):
            if facts.get(field) not in (None, "", "(null)", "Unknown"):
                lines[label] = facts[field]
    lines["status"] = _own_status(run) or "not started"
    lines |= _progress(run)
    return "\n".join(f"{label:<14}{value}" for label, value in lines.items())


def logs(run: Path, *, rank: int | None, lines: int, follow: bool) -> None:
    """Print the end of a log, and what is added to it while a job of the run is there.

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
            while is_in_queue(run) is not None:
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
    jobs = [job for job in jobs_of(run) if not job.has_ended]
    if not jobs:
        raise UserError(f"{run.name} has no job in the queue; there is nothing to stop.")
    told = []
    # Those that wait for another first, or its end would start them.
    for job in reversed(jobs):
        if job.state == "RUNNING":
            # The batch script passes it on, and does not queue the job again after it.
            ask("scancel", "--batch", "--signal=TERM", job.number)
            told.append(f"job {job.number} saves and ends; follow it with python -m slurm status {run}")
        else:
            ask("scancel", job.number)
            told.append(f"job {job.number} was {job.state.lower()} and has left the queue")
    return "\n".join(told)


def submit(run: Path) -> str:
    """Submit the jobs that are written in the run directory.

    Raises:
        UserError: there is none, it is in the queue, or Slurm refuses.
    """
    files = scripts_of(run)
    if not files:
        raise UserError(f"there is no job in {run / FILES}; python -m train ... action=dry_run writes it.")
    require_not_queued(run)
    numbers = submit_files(files)
    Submitted(jobs=tuple(numbers)).write(run)
    return f"job {', then '.join(numbers)}; follow it with python -m slurm status {run}"


def _current(jobs: Sequence[QueuedJob]) -> QueuedJob:
    """The one that runs or is next to; else the one the others waited for in vain; else the last."""
    alive = (job for job in jobs if not job.has_ended)
    return next(alive, None) or next((job for job in jobs if job.state != "COMPLETED"), jobs[-1])


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
