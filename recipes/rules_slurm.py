"""Rules about what is asked of Slurm. What only Slurm itself knows (accounts, partitions) sbatch answers."""

from __future__ import annotations

import re
from collections.abc import Iterator

from conf.errors import Problem
from conf.faults import did_you_mean
from conf.schema import RunConfig, SlurmConfig
from parallel.plan.hardware import UnknownGpuError, gpu_named
from recipes import fit
from recipes.chain import is_here
from recipes.machine import Machine
from recipes.rules_layout import trainings_of

OURS = {
    "--nodes": "cluster.num_nodes",
    "-N": "cluster.num_nodes",
    "--ntasks": "cluster.ranks_per_node",
    "-n": "cluster.ranks_per_node",
    "--ntasks-per-node": "cluster.ranks_per_node",
    "--gpus-per-node": "cluster.ranks_per_node",
    "--gres": "cluster.ranks_per_node",
    "--gpus": "cluster.ranks_per_node",
    "-G": "cluster.ranks_per_node",
    "--no-requeue": "cluster.slurm.max_requeues",
    "--no-kill": "cluster.slurm.spare_nodes",
    "-k": "cluster.slurm.spare_nodes",
    "--time": "cluster.slurm.time_limit_minutes",
    "-t": "cluster.slurm.time_limit_minutes",
    "--signal": "cluster.slurm.signal_seconds",
    "--account": "cluster.slurm.account",
    "-A": "cluster.slurm.account",
    "--partition": "cluster.slurm.partition",
    "-p": "cluster.slurm.partition",
    "--qos": "cluster.slurm.qos",
    "-q": "cluster.slurm.qos",
    "--reservation": "cluster.slurm.reservation",
    "--cpus-per-task": "cluster.slurm.cpus_per_node",
    "-c": "cluster.slurm.cpus_per_node",
    "--exclusive": "cluster.slurm.exclusive",
    "--array": "a sweep, -m",
    "-a": "a sweep, -m",
    "--output": "runs_dir",
    "-o": "runs_dir",
    "--chdir": "the directory the command is typed in",
    "-D": "the directory the command is typed in",
}
"""Options of sbatch that the configuration has a value of its own for."""
START_SECONDS = 120
"""About what a job takes before its first step; less time than this is not worth queueing for."""


def slurm_is_described(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """What is asked of Slurm is there where Slurm is asked, and devices are named where they cannot be looked at."""
    cluster = config.cluster
    if cluster.kind != "slurm":
        if config.action == "dry_run":
            yield Problem(
                "action",
                f"is dry_run, which writes a Slurm job, and cluster.kind is {cluster.kind}. Use action=check, or a "
                "cluster of Slurm, e.g. cluster=h200_slurm.",
            )
        return
    if cluster.slurm is None:
        yield Problem("cluster.slurm", "is null, and cluster.kind is slurm. Start from cluster=h200_slurm.")
    if cluster.device == "auto":
        yield Problem("cluster.device", "is auto; other machines cannot be looked at from here. Set cuda or cpu.")
    if cluster.address is not None:
        yield Problem("cluster.address", "is given; a Slurm job starts a Ray of its own. Set cluster.address=null.")
    if cluster.node_labels:
        yield Problem(
            "cluster.node_labels",
            "are given; a Slurm job takes the nodes it is allotted. Choose them with "
            "cluster.slurm.sbatch=[--constraint=FEATURE] and set cluster.node_labels={}.",
        )


def job_leaves_time(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Between its start and the warning before its end a job has time to train."""
    slurm = _slurm(config)
    if slurm is None or slurm.time_limit_minutes is None:
        return
    seconds = 60 * slurm.time_limit_minutes
    if seconds < slurm.signal_seconds + START_SECONDS:
        yield Problem(
            "cluster.slurm.time_limit_minutes",
            f"is {slurm.time_limit_minutes} ({seconds} s): a job takes about {START_SECONDS} s to start and is asked "
            f"to stop {slurm.signal_seconds} s before its end (signal_seconds). Set it to at least "
            f"{-(-(slurm.signal_seconds + START_SECONDS) // 60)}, or lower signal_seconds.",
        )


def checkpoints_come_within_a_job(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """A job is long enough to reach a regular checkpoint, or each failure would cost all of it."""
    slurm = _slurm(config)
    if slurm is None or slurm.time_limit_minutes is None:
        return
    useful = 60 * slurm.time_limit_minutes - slurm.signal_seconds
    for name, training in trainings_of(config).items():
        seconds = step_seconds(config, name)
        if seconds is None or training.checkpoint_every_steps == 0 or not is_here(config, name):
            continue
        interval = training.checkpoint_every_steps * seconds
        if interval > useful:
            yield Problem(
                "cluster.slurm.time_limit_minutes",
                f"is {slurm.time_limit_minutes}, and stage '{name}' reaches its first checkpoint after "
                f"{training.checkpoint_every_steps} steps of about {seconds:.1f} s = {interval / 60:.0f} min; a job "
                f"would end before. Set it to at least {-(-int(interval + slurm.signal_seconds) // 60)}, or "
                f"stages.{name}.training.checkpoint_every_steps to at most {max(1, int(useful / seconds))}.",
            )


def step_seconds(config: RunConfig, stage: str) -> float | None:
    """What the planner expects of a step; None on CPUs and for GPUs it does not know."""
    if config.cluster.device != "cuda":
        return None
    try:
        gpu = gpu_named(config.budget.gpu)
    except UnknownGpuError:
        return None
    return fit.step_of_stage(config, stage, gpu).seconds


def stages_with_nodes_exist(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Stages that take other numbers of nodes are stages of the recipe."""
    slurm = _slurm(config)
    for name in slurm.stage_nodes if slurm else ():
        if name not in config.stages:
            meant = did_you_mean(name, config.stages)
            yield Problem(
                "cluster.slurm.stage_nodes",
                f"there is no stage '{name}'.{meant} This recipe has {', '.join(config.stages)}.",
            )


def nodes_are_asked_for_whole(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """A job that shares its nodes says how many processors it needs."""
    slurm = _slurm(config)
    if slurm is not None and not slurm.exclusive and slurm.cpus_per_node is None:
        yield Problem(
            "cluster.slurm.cpus_per_node",
            "is null, and cluster.slurm.exclusive is false: Slurm would give one processor. Set it, e.g. to "
            f"{2 * (config.cluster.ranks_per_node or 1)}.",
        )


def container_has_an_image(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """A runtime runs an image, and mounts are pairs of paths."""
    slurm = _slurm(config)
    if slurm is None:
        return
    container = slurm.container
    if (container.runtime == "none") != (container.image is None):
        yield Problem(
            "cluster.slurm.container",
            f"has runtime {container.runtime} and image {container.image}. Give both, or runtime=none and image=null.",
        )
    for mount in container.mounts:
        if not re.fullmatch(r"/[^:,]*:/[^:,]*(:[a-z]+)?", mount):
            yield Problem("cluster.slurm.container.mounts", f"'{mount}' is not /HOST/PATH:/CONTAINER/PATH.")


def script_lines_are_lines(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """What goes into the script cannot break out of its line, and says nothing that is said elsewhere."""
    slurm = _slurm(config)
    if slurm is None:
        return
    for option in slurm.sbatch:
        # The value of a short option may follow without a space: -N4.
        name = re.split(r"[=\s]", option)[0] if option.startswith("--") else option[:2]
        if not option.startswith("-") or "\n" in option:
            yield Problem("cluster.slurm.sbatch", f"{option!r} is not one option of sbatch, e.g. --constraint=ib.")
        elif name in OURS:
            yield Problem("cluster.slurm.sbatch", f"{option} is for {OURS[name]} to say. Set that instead.")
    for name in slurm.variables:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            yield Problem("cluster.slurm.variables", f"'{name}' is no name of an environment variable.")
        elif re.search(r"(?i)(key|token|secret|password)$", name):
            yield Problem(
                "cluster.slurm.variables",
                f"{name} would be written into the run directory for all to read. Export it where you submit: the job "
                "inherits your environment.",
            )
    for field in ("account", "partition", "qos", "reservation"):
        value = getattr(slurm, field)
        if value is not None and not re.fullmatch(r"[\w.,@+=:-]+", value):
            yield Problem(f"cluster.slurm.{field}", f"is {value!r}, which is no name of Slurm's.")


def preflight_is_of_use(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Warn of checks that are switched off on GPUs."""
    slurm = _slurm(config)
    if slurm is None or config.cluster.device != "cuda":
        return
    fields = ("intra_node_gb_per_second", "node_pair_gb_per_second", "infiniband_ports")
    off = [field for field in fields if not getattr(slurm.preflight, field)]
    if off:
        yield Problem("cluster.slurm.preflight", f"does not look at {', '.join(off)} (0).")


def _slurm(config: RunConfig) -> SlurmConfig | None:
    return config.cluster.slurm if config.cluster.kind == "slurm" else None


RULES = (
    slurm_is_described,
    job_leaves_time,
    checkpoints_come_within_a_job,
    stages_with_nodes_exist,
    nodes_are_asked_for_whole,
    container_has_an_image,
    script_lines_are_lines,
)
WARNINGS = (preflight_is_of_use,)
