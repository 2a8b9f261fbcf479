"""From a configuration to a finished run: the one process a user starts.

It decides, prepares, launches, follows and reports; it never touches a tensor. Exit codes: 0 finished, 1 a rank failed,
2 something the user can mend, 75 stopped and can be continued (EX_TEMPFAIL, on which schedulers requeue), 130 ended by
a second Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from conf import load
from conf.schema import ClusterConfig, RunConfig
from data.prepare import prepared
from data.tiers import check_tiers
from data.tokenizer import tokenizer_file
from recipes import check
from recipes.chain import in_one_job, service_here
from recipes.machine import Machine, find_machine
from recipes.plan_action import make_plan
from recipes.reopen import reopen
from recipes.serving import engine_of_service, mesh_of_service
from recipes.stop import StopRequest, stop_on_signals
from train import rundir
from train.console import make_console, print_failure, print_header, print_results
from train.launch import Gang, RankError
from train.metrics import MetricsWriter, read
from train.progress import Display
from train.ray_train import RayTrain
from train.report import write_report
from train.rundir import RunDir, Status, replace_text
from train.summary import summarise
from train.tracking import Tracker
from train.worker import TRAINING_WORLD, World

EXIT_CODES: dict[Status, int] = {"finished": 0, "failed": 1, "stopped": 75}
INTERRUPTED = 130
TRACKING_SECONDS = 20.0

Datasets = dict[str, str]


def execute(config: RunConfig) -> int:
    """Run a recipe, or only check or plan it; returns the exit code.

    Raises:
        UserError: something is wrong that the user can mend; nothing was launched.
    """
    run = None
    if config.resume is not None:
        run, config = reopen(config)
    machine = find_machine()
    config = check.resolve(config, machine)
    if config.action == "plan":
        make_plan(config, make_console())
        return 0
    check.check(config, machine)
    if config.action == "check":
        console = make_console()
        print_header(console, config, str(machine), world_size_of(config))
        for warning in check.warnings(config, machine):
            console.print(f"warning: {warning}", style="yellow", markup=False)
        console.print(f"{config.name} passes every check; nothing was launched.")
        return 0
    if run is None:
        run = rundir.create(Path(config.runs_dir), config.name)
    return drive(run, config, machine, config.cluster)


def drive(
    run: RunDir, config: RunConfig, machine: Machine, place: ClusterConfig, *, node_order: Sequence[str] = ()
) -> int:
    """Bring a checked run to its end; returns the exit code.

    Args:
        run: its directory.
        config: resolved.
        machine: this one.
        place: where its ranks are started: its own cluster, or what stands for it inside a Slurm job.
        node_order: addresses of the place's nodes in the order they get ranks.

    Raises:
        UserError: something is wrong that the user can mend; no rank was started.
    """
    console = make_console()
    driver = Driver(
        machine=machine,
        console=console,
        stop=StopRequest(),
        use_gpu=check.uses_gpu(config, machine),
        place=place,
        node_order=tuple(node_order),
    )
    warnings = [str(problem) for problem in check.warnings(config, machine)]
    with run.locked(), stop_on_signals(driver.stop):
        try:
            return EXIT_CODES[driver.lead(run, config, warnings)]
        except BaseException as error:
            # A full disk takes the status with it; the reason still reaches the screen.
            with suppress(OSError):
                run.write_status("failed")
            match error:
                case KeyboardInterrupt():
                    console.print(f"Ended at once. Continue with resume={run.path}", soft_wrap=True)
                    return INTERRUPTED
                case BrokenPipeError():
                    # Whoever read the screen is gone; Python would complain once more when it flushes at exit.
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                case OSError():
                    print_failure(console, who="the run", reason=str(error), log=None)
                case _:
                    raise
            return EXIT_CODES["failed"]


@dataclass(kw_only=True, slots=True)
class Driver:
    """One recipe and, where it has no model to start from yet, the recipe before it, on one set of ranks."""

    machine: Machine
    console: Console
    stop: StopRequest
    use_gpu: bool
    place: ClusterConfig
    node_order: tuple[str, ...]

    def lead(self, run: RunDir, config: RunConfig, warnings: list[str]) -> Status:
        """Bring a run to its end, that of the recipe it starts from included."""
        print_header(self.console, config, str(self.machine), world_size_of(config))
        open_run(run, config)
        launcher: Gang | RayTrain
        if config.launcher == "gang":
            launcher = Gang(self.place, use_gpu=self.use_gpu, node_order=self.node_order)
        else:
            launcher = RayTrain(self.place, use_gpu=self.use_gpu)
        with ThreadPoolExecutor(1, thread_name_prefix="prepare") as pool:
            # Reading and tokenising takes about as long as starting the ranks: both at once.
            datasets = pool.submit(prepare_sources, config)
            # Ray puts handlers of its own in place of ours when it starts; ours go over them.
            with launcher, stop_on_signals(self.stop):
                status, config = self.with_origin(run, config, launcher, datasets)
                if status == "finished":
                    status = self.follow(run, config, launcher, datasets, warnings)
        return status

    def with_origin(
        self, run: RunDir, config: RunConfig, launcher: Gang | RayTrain, datasets: Future[Datasets]
    ) -> tuple[Status, RunConfig]:
        """Make sure there is a model to start from, and name its checkpoint in the configuration."""
        if config.init is None:
            return "finished", config
        if not config.init.startswith("recipe:"):
            return "finished", dataclasses.replace(config, init=str(Path(config.init).resolve()))
        recipe = config.init.removeprefix("recipe:")
        runs_dir = Path(config.runs_dir)
        path = rundir.newest_finished(runs_dir, recipe, config.model)
        if path is None:
            # Only a rehearsal comes here: recipes/check.py refuses a full-size run without its origin.
            self.console.print(f"There is no finished {recipe} run in {runs_dir} to start from: rehearsing it first.\n")
            origin, origin_config = self.open_origin(config, recipe)
            with origin.locked():
                status = self.follow(origin, origin_config, launcher, datasets, [])
            if status != "finished":
                run.write_status(status)
                return status, config
            path = origin.path
        checkpoint = RunDir(path).final_checkpoint(load.read(RunDir(path).config_file).order)
        assert checkpoint is not None, f"{path} is finished and has no model"
        self.console.print(f"Starting from {checkpoint}\n", soft_wrap=True, highlight=False)
        return "finished", dataclasses.replace(config, init=checkpoint)

    def open_origin(self, config: RunConfig, recipe: str) -> tuple[RunDir, RunConfig]:
        """The run of the recipe this one starts from: continued where this one is, else new."""
        origin_config = check.resolve(in_one_job(load.compose_like(config, recipe)), self.machine)
        check.check(origin_config, self.machine)
        unfinished = rundir.newest_unfinished(Path(config.runs_dir), recipe) if config.resume else None
        if unfinished is not None and load.read(RunDir(unfinished).config_file) == origin_config:
            origin = RunDir(unfinished)
        else:
            origin = rundir.create(Path(config.runs_dir), recipe)
        open_run(origin, origin_config)
        return origin, origin_config

    def follow(
        self,
        run: RunDir,
        config: RunConfig,
        launcher: Gang | RayTrain,
        datasets: Future[Datasets],
        warnings: list[str],
    ) -> Status:
        """Let the ranks work on one run; record, screen, W&B and report included."""
        replace_text(run.datasets_file, json.dumps(datasets.result(), indent=2))
        shutil.copyfile(tokenizer_file(config.data.tokenizer), run.tokenizer_file)
        load.write(config, run.config_file)
        metrics = MetricsWriter(run.metrics_file)
        offset = run.metrics_file.stat().st_size
        started = time.monotonic()
        metrics.write(
            "run_started",
            run=run.name,
            recipe=config.name,
            scale=config.scale,
            machine=str(self.machine),
            world_size=launcher.num_ranks,
            mesh=str(check.mesh_of(config)),
            restarts=sum(record["kind"] == "run_started" for record in read(run.metrics_file)),
        )
        for warning in warnings:
            metrics.write("message", level="warning", text=warning)
        tracker = Tracker(run.path, mode=config.tracking.mode)
        with Display(self.console, run.metrics_file, config.order, offset=offset) as display:
            status = self.watch(run, worlds_of(config), launcher, metrics, display)
        run.write_status(status)
        metrics.write("run_ended", status=status, exit_code=EXIT_CODES[status], seconds=time.monotonic() - started)
        tracker.finish(TRACKING_SECONDS)
        report = write_report(run.path)
        print_results(self.console, summarise(list(read(run.metrics_file))), closing(run, config, status, report))
        return status

    def watch(
        self, run: RunDir, worlds: list[World], launcher: Gang | RayTrain, metrics: MetricsWriter, display: Display
    ) -> Status:
        """Wait for the ranks, showing what they write and passing a stop on."""

        def on_poll() -> None:
            if self.stop.asked and not run.stop_file.exists():
                run.stop_file.touch()
                metrics.write("message", level="info", text="stopping: the step is finished and the state saved")
            display.update()

        try:
            return launcher.run(run, worlds, on_poll)
        except RankError as error:
            display.update()
            print_failure(self.console, who=error.who, reason=error.details or error.reason, log=str(error.log))
            metrics.write("message", level="error", text=str(error))
            return "failed"


def open_run(run: RunDir, config: RunConfig) -> None:
    """Make a run directory ready for a new attempt."""
    load.write(config, run.config_file)
    run.stop_file.unlink(missing_ok=True)
    shutil.rmtree(run.failures, ignore_errors=True)
    run.failures.mkdir()
    run.write_status("running")


def prepare_sources(config: RunConfig) -> Datasets:
    """Tokenise what is not tokenised yet: source -> path of its dataset.

    Raises:
        DataError: a source cannot be read or does not fit the tokenizer.
    """
    check_tiers(config.data.tiers)
    paths = {name: prepared(source, config.data).path for name, source in config.data.sources.items()}
    # Ranks may have another working directory.
    return {name: path if "://" in path else str(Path(path).resolve()) for name, path in paths.items()}


def worlds_of(config: RunConfig) -> list[World]:
    """The students' ranks (any run's that train), and those of a teacher that has its own."""
    worlds = [World(name=TRAINING_WORLD, entry="recipes.run:run_stages", size=check.mesh_of(config).world_size)]
    service = service_here(config)
    if service is not None:
        size, engine = mesh_of_service(service).world_size, engine_of_service(config, service)
        worlds.append(World(name="teacher", entry="recipes.teacher:teach", size=size, engine=engine))
    return worlds


def world_size_of(config: RunConfig) -> int:
    """Ranks of a resolved configuration, a teacher's included."""
    assert config.cluster.ranks_per_node is not None
    return config.cluster.num_nodes * config.cluster.ranks_per_node


def closing(run: RunDir, config: RunConfig, status: Status, report: Path) -> dict[str, str]:
    """What a user may want next: label -> path or command."""
    lines = {"run": str(run.path), "report": str(report)}
    if any(run.export.rglob("*.safetensors")):
        lines["model"] = str(run.export)
    if (run.path / "wandb").exists():
        lines["W&B"] = str(run.path / "wandb")
    if status != "finished":
        lines["continue with"] = f"python -m train recipe={config.name} resume={run.path}"
    elif config.scale == "rehearsal":
        lines["full size"] = f"python -m train recipe={config.name} cluster=h200_slurm"
    return lines
