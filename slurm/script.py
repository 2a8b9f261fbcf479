"""The batch script of a run: a pure function of its configuration and of where it is. Golden files hold examples."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.schema import ClusterConfig, SlurmConfig

FILES = "slurm"
"""Directory within a run for everything of its jobs."""
SCRIPTS = "job*.sbatch"
OUTPUT = "output.log"
SHARED_PART = Path(__file__).with_name("ray_cluster.sh")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is submitted at once.

    Attributes:
        runs: run directories, absolute; more than one make an array.
        cluster: of all of them.
        driver: module that works on a run, given its directory, the address of Ray and those of the nodes.
        directory: the working directory, absolute.
        python: the interpreter that submits.
        number: which of its run's jobs, from 1; a later one waits for the one before it.
    """

    runs: tuple[Path, ...]
    cluster: ClusterConfig
    driver: str
    directory: Path
    python: str
    number: int = 1

    @property
    def file(self) -> Path:
        """Where its script is kept."""
        return self.runs[0] / FILES / f"job{f'-{self.number}' if self.number > 1 else ''}.sbatch"

    @property
    def slurm(self) -> SlurmConfig:
        """What is asked of Slurm."""
        assert self.cluster.slurm is not None, "cluster.kind is slurm"
        return self.cluster.slurm


def script(job: Job) -> str:
    """The text that sbatch is given."""
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {option}" for option in _options(job)),
            "",
            *_settings(job),
            "",
            *_environment(job.slurm),
            SHARED_PART.read_text(),
        ]
    )


def _options(job: Job) -> list[str]:
    slurm, cluster = job.slurm, job.cluster
    first = job.runs[0] / FILES
    output = first / (OUTPUT if len(job.runs) == 1 else "array-%a.log")
    at_most = f"%{slurm.max_array_jobs}" if slurm.max_array_jobs else ""
    named = {
        "job-name": job.runs[0].name,
        "array": f"0-{len(job.runs) - 1}{at_most}" if len(job.runs) > 1 else None,
        "nodes": cluster.num_nodes + slurm.spare_nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": slurm.cpus_per_node,
        "gpus-per-node": _gpus_per_node(job),
        "mem": 0 if slurm.exclusive else None,
        "account": slurm.account,
        "partition": slurm.partition,
        "qos": slurm.qos,
        "reservation": slurm.reservation,
        "time": slurm.time_limit_minutes,
        "signal": f"B:USR1@{slurm.signal_seconds}",
        "chdir": job.directory,
        "output": str(output).replace(str(first), str(first).replace("%", "%%")),
        "open-mode": "append",
    }
    options = [f"--{name}={shlex.quote(str(value))}" for name, value in named.items() if value is not None]
    # With spares, losing a node must not end the job; without, Slurm queues it again by itself.
    switches = ["--requeue", *(["--exclusive"] * slurm.exclusive), *(["--no-kill"] * bool(slurm.spare_nodes))]
    # Where the job before has failed there is nothing to wait for.
    waiting = ["--kill-on-invalid-dep=yes"] if job.number > 1 else []
    return [*options, *switches, *waiting, *slurm.sbatch]


def _settings(job: Job) -> list[str]:
    slurm, cluster = job.slurm, job.cluster
    preflight = slurm.preflight
    return [
        _array("runs", [str(run) for run in job.runs]),
        f"num_nodes={cluster.num_nodes}",
        f"max_requeues={slurm.max_requeues}",
        f"preflight_seconds={preflight.timeout_seconds:g}",
        _array("srun_options", _srun_options(job)),
        _array("python", _python(job)),
        f"driver={job.driver}",
        _array(
            "node_options",
            [
                f"--ranks={cluster.ranks_per_node}",
                f"--gpus={cluster.ranks_per_node if cluster.device == 'cuda' else 0}",
            ],
        ),
        _array(
            "preflight_options",
            [
                f"--infiniband-ports={preflight.infiniband_ports}",
                f"--infiniband-gbit={preflight.infiniband_gbit_per_second:g}",
                f"--disk-gib={preflight.local_disk_gib:g}",
            ],
        ),
        _array(
            "bandwidth_options",
            [
                f"--intra-node={preflight.intra_node_gb_per_second:g}",
                f"--node-pair={preflight.node_pair_gb_per_second:g}",
                f"--seconds={preflight.timeout_seconds:g}",
            ],
        ),
        _array("choose_options", [f"--clock-seconds={preflight.clock_seconds:g}"]),
        _function("before", slurm.before),
        _function("after", slurm.after),
    ]


def _environment(slurm: SlurmConfig) -> list[str]:
    lines = [f"module load {shlex.quote(module)}" for module in slurm.modules]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in _sorted(slurm.variables)]
    return [*lines, ""] if lines else []


def _mounts(job: Job) -> list[str]:
    """Directories seen in a container where they are outside it, and those that are asked for."""
    own = dict.fromkeys([str(job.directory), *(str(run.parent) for run in job.runs)])
    return [*(f"{path}:{path}" for path in own), *job.slurm.container.mounts]


def _srun_options(job: Job) -> list[str]:
    # Steps share the allocation: the ranks get all of it, and the checks beside them nothing of their own.
    # Ranks find each other by themselves, whatever MpiDefault starts for others.
    options = ["--overlap", "--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=0", "--mpi=none"]
    container = job.slurm.container
    if container.runtime == "pyxis":
        mounts = ",".join(_mounts(job))
        options += [
            f"--container-image={container.image}",
            f"--container-mounts={mounts}",
            f"--container-workdir={job.directory}",
        ]
    return options


def _python(job: Job) -> list[str]:
    container = job.slurm.container
    if container.runtime == "none":
        return [job.slurm.python or job.python]
    inside = [job.slurm.python or "python"]
    if container.runtime == "pyxis":
        return inside
    gpus = ["--nv"] if job.cluster.device == "cuda" else []
    binds = [f"--bind={mount}" for mount in _mounts(job)]
    return ["apptainer", "exec", *gpus, *binds, f"--pwd={job.directory}", str(container.image), *inside]


def _gpus_per_node(job: Job) -> int | None:
    return job.cluster.ranks_per_node if job.cluster.device == "cuda" else None


def _array(name: str, words: Sequence[str]) -> str:
    return f"{name}=({' '.join(shlex.quote(word) for word in words)})"


def _function(name: str, lines: Sequence[str]) -> str:
    body = "".join(f"\n    {line}" for line in lines) or "\n    :"
    return f"{name}() {{{body}\n}}"


def _sorted(values: Mapping[str, str]) -> list[tuple[str, str]]:
    return sorted(values.items())
