"""From configurations to jobs in a Slurm queue: check, make the run directory, write the job, submit, say what next.

A command line may ask for several runs (a sweep); they are submitted together when all of them have passed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from conf import load
from conf.schema import RunConfig
from recipes import check
from recipes.driver import world_size_of
from recipes.machine import find_machine
from recipes.reopen import reopen
from slurm.script import FILES, OUTPUT, Job
from slurm.submit import require_not_queued, submit, write_script
from train import rundir
from train.console import make_console, print_header

DRIVER = "recipes.job"


@dataclass(slots=True)
class Queue:
    """What a command line has asked for so far."""

    console: Console = field(default_factory=make_console)
    jobs: list[Job] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def add(self, config: RunConfig) -> int:
        """Check a run, make its directory and write its job; returns exit code 0.

        Raises:
            UserError: something is wrong that the user can mend; nothing was made.
        """
        run = None
        if config.resume is not None:
            run, config = reopen(config)
        machine = find_machine()
        config = check.resolve(config, machine)
        check.check(config, machine)
        print_header(self.console, config, f"queued with Slurm, cluster {config.cluster.name}", world_size_of(config))
        for problem in check.warnings(config, machine):
            self.console.print(f"warning: {problem}", style="yellow", markup=False)
        if run is None:
            run = rundir.create(Path(config.runs_dir), config.name)
        elif config.action != "dry_run":
            require_not_queued(run.path)
        load.write(config, run.config_file)
        job = Job(runs=(run.path,), cluster=config.cluster, driver=DRIVER, directory=Path.cwd(), python=sys.executable)
        file = write_script(job)
        self._say("run", run.path)
        self._say("script", file)
        if config.action == "dry_run":
            self._say("submit with", f"python -m slurm submit {run.path}")
        else:
            self.jobs.append(job)
            self.names.append(config.name)
        return 0

    def submit(self) -> None:
        """Hand everything to Slurm.

        Raises:
            UserError: Slurm is missing or refuses.
        """
        if not self.jobs:
            return
        for job, number, name in zip(self.jobs, submit(self.jobs), self.names, strict=True):
            run = job.runs[0]
            self._say("job", number)
            self._say("output", run / FILES / OUTPUT)
            self._say("follow", f"python -m slurm status {run}; python -m slurm logs {run}")
            self._say("stop", f"python -m slurm stop {run}")
            self._say("continue with", f"python -m train recipe={name} resume={run}")

    def _say(self, label: str, value: object) -> None:
        self.console.print(f"{label:<15}{value}", soft_wrap=True, highlight=False, markup=False)
