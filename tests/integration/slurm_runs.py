"""Runs as jobs of a Slurm on this host: what a user types, and what Slurm says of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
from command_line import TINY_FOUNDATION, environment, records, train
from slurm_cluster import SlurmCluster, missing_programs

from data.corpora import shipped

NEEDS_SLURM = [
    pytest.mark.slurm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        bool(missing_programs()),
        reason=f"needs Slurm: apt-get install slurmctld slurmd slurm-client munge ({', '.join(missing_programs())})",
    ),
]
ON_CPUS = (
    *TINY_FOUNDATION,
    "order=[pretrain]",
    "cluster=h200_slurm",
    "scale=rehearsal",
    "cluster.device=cpu",
    "cluster.ranks_per_node=1",
    "cluster.slurm.exclusive=false",
    "cluster.slurm.cpus_per_node=1",
    "cluster.slurm.time_limit_minutes=10",
    "cluster.slurm.signal_seconds=60",
    "cluster.slurm.preflight.intra_node_gb_per_second=0",
    "cluster.slurm.preflight.node_pair_gb_per_second=0",
    "cluster.slurm.preflight.infiniband_ports=0",
    "cluster.slurm.preflight.local_disk_gib=0",
)
ENOUGH_SECONDS = 280
HIDE = 'mount -t tmpfs none "$0" && exec "$@"'


class Slurm:
    """The cluster, and commands of ours that use it."""

    def __init__(self, cluster: SlurmCluster, temporary: str, text: Path, unseen: Path | None) -> None:
        self.cluster, self.unseen = cluster, unseen
        # Jobs that start at once each prepare what is not prepared yet: a text of seconds would be too long.
        self.text = [f"data.sources.{name}.path={text}" for name in ("business", "development", "creative")]
        self.variables = cluster.environment | {"TMPDIR": temporary}

    def train(self, runs_dir: Path, *overrides: str, code: int = 0) -> list[Path]:
        """Type `python -m train`; returns the run directories it made, in order."""
        ended = train(runs_dir, *ON_CPUS, *self.text, *overrides, **self.variables)
        assert ended.code == code, ended.output
        self.output = ended.output
        return [Path(name) for name in re.findall(r"^run +(\S+)$", ended.output, re.MULTILINE)]

    def ask(self, command: str, run: Path, *options: str, code: int = 0) -> str:
        """Type `python -m slurm COMMAND RUN`."""
        done = subprocess.run(
            [sys.executable, "-m", "slurm", command, str(run), *options],
            env=environment() | self.variables,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def jobs(self, run: Path) -> list[str]:
        """Numbers of the run's jobs, in order."""
        return list(json.loads((run / "slurm" / "job.json").read_text())["jobs"])

    def facts(self, run: Path, link: int = 0) -> dict[str, str]:
        """What Slurm says of the run's first job, or a later one."""
        return self.cluster.job(self.jobs(run)[link])

    def wait_until(self, run: Path, condition: Callable[[], bool]) -> None:
        """Wait until it holds; if that takes too long, what the run's jobs have written is told."""
        deadline = time.monotonic() + ENOUGH_SECONDS
        while not condition():
            assert time.monotonic() < deadline, self.told(run)
            time.sleep(0.1)

    def wait_for_end(self, run: Path, link: int = 0) -> dict[str, str]:
        """Wait for one of the run's jobs; returns what Slurm says of it."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait_until(run, lambda: self.facts(run, link)["JobState"] in ended)
        return self.facts(run, link)

    def wait_for_step(self, run: Path, step: int) -> None:
        """Wait until the run has taken a step."""
        metrics = run / "metrics.jsonl"
        self.wait_until(run, lambda: metrics.exists() and any(each["step"] >= step for each in records(run, "step")))

    def told(self, run: Path) -> str:
        """Everything the job of a run has written."""
        logs = [run / "slurm" / "output.log", *sorted(run.glob("slurm/*/*.log")), *sorted(run.glob("logs/*"))]
        return "\n".join(f"== {log}\n{log.read_text()[-3000:]}" for log in logs if log.exists())


@contextmanager
def running_slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Four nodes; the last one, where this machine lets it, does not see the directory `unseen`."""
    unseen: Path | None = tmp_path_factory.mktemp("unseen")
    # Sockets have short names.
    temporary = tempfile.mkdtemp(prefix="s")
    text = tmp_path_factory.mktemp("text") / "business.parquet"
    parquet.write_table(parquet.read_table(shipped("shipped:business", ".parquet")).slice(0, 100), text)
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    inside = ("unshare", "--mount", "sh", "-c", HIDE, str(unseen))
    if (
        shutil.which("unshare") is None
        or subprocess.run([*inside, "true"], capture_output=True, check=False).returncode
    ):
        unseen, inside = None, ()
    try:
        cluster.start(inside={cluster.num_nodes: inside})
        yield Slurm(cluster, temporary, text, unseen)
    finally:
        cluster.stop()
        shutil.rmtree(temporary, ignore_errors=True)
