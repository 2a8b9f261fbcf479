"""From configurations to jobs in a Slurm queue: check, make the run directory, write its jobs, submit, say what next.

A command line may ask for several runs (a sweep); they are submitted together when all of them have passed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from conf import load
from conf.schema import RunConfig
from recipes import chain, check
from recipes.driver import world_size_of
from recipes.machine import find_machine
from recipes.reopen import reopen
from slurm.script import FILES, OUTPUT, Job
from slurm.submit import require_not_queued, submit, write_scripts
from train import rundir
from train.console import make_console, print_header
from train.rundir import RunDir

DRIVER = "recipes.job"


@dataclass(slots=True)
class Queue:
    """What a command line has asked for so far."""

    console: Console = field(default_factory=make_console)
    chains: list[list[Job]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def add(self, config: RunConfig) -> int:
        """Check a run, make its directory and write its jobs; returns exit code 0.

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
        jobs = jobs_of(config, run)
        self._say("run", run.path)
        for file in write_scripts(jobs):
            self._say("script", file)
        if config.action == "dry_run":
            self._say("submit with", f"python -m slurm submit {run.path}")
        else:
            self.chains.append(jobs)
            self.names.append(config.name)
        return 0

    def submit(self) -> None:
        """Hand everything to Slurm.

        Raises:
            UserError: Slurm is missing or refuses.
        """
        if not self.chains:
            return
        for jobs, numbers, name in zip(self.chains, submit(self.chains), self.names, strict=True):
            run = jobs[0].runs[0]
            self._say("job", ", then ".join(numbers))
            self._say("output", run / FILES / OUTPUT)
            self._say("follow", f"python -m slurm status {run}; python -m slurm logs {run}")
            self._say("stop", f"python -m slurm stop {run}")
            self._say("continue with", f"python -m train recipe={name} resume={run}")

    def _say(self, label: str, value: object) -> None:
        self.console.print(f"{label:<15}{value}", soft_wrap=True, highlight=False, markup=False)


def jobs_of(config: RunConfig, run: RunDir) -> list[Job]:
    """The jobs a run still needs, in order: mostly one; more where stages take other numbers of nodes."""
    links = chain.links(config)
    left = [link for link in links if any(run.result(stage) is None for stage in link.stages)] or links[-1:]
    return [
        Job(
            runs=(run.path,),
            cluster=chain.on_nodes(config, link.num_nodes).cluster,
            driver=DRIVER,
            directory=Path.cwd(),
            python=sys.executable,
            number=number,
        )
        for number, link in enumerate(left, start=1)
    ]
