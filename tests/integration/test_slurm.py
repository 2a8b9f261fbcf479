"""Jobs of a real Slurm on this host: queued again, preempted, moved off dead nodes, refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import TINY_FOUNDATION, environment, losses, records, train, wait_for
from slurm_cluster import SlurmCluster, missing_programs

from slurm.submit import submit_files

pytestmark = [
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
FOUR_NODES = ("cluster.num_nodes=4", "engine.mesh.pipeline=2")
ENOUGH_SECONDS = 280
HIDE = 'mount -t tmpfs none "$0" && exec "$@"'


class Slurm:
    """The cluster, and commands of ours that use it."""

    def __init__(self, cluster: SlurmCluster, temporary: str, unseen: Path | None) -> None:
        self.cluster, self.unseen = cluster, unseen
        self.variables = cluster.environment | {"TMPDIR": temporary}

    def train(self, runs_dir: Path, *overrides: str, code: int = 0) -> list[Path]:
        """Type `python -m train`; returns the run directories it made, in order."""
        ended = train(runs_dir, *ON_CPUS, *overrides, **self.variables)
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

    def wait_for_end(self, run: Path, link: int = 0) -> dict[str, str]:
        """Wait for one of the run's jobs; returns what Slurm says of it."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        deadline = time.monotonic() + ENOUGH_SECONDS
        while (facts := self.facts(run, link))["JobState"] not in ended:
            assert time.monotonic() < deadline, self.told(run)
            time.sleep(0.2)
        return facts

    def wait_for_step(self, run: Path, step: int) -> None:
        """Wait until the run has taken a step."""
        deadline = time.monotonic() + ENOUGH_SECONDS
        while not ((run / "metrics.jsonl").exists() and any(each["step"] >= step for each in records(run, "step"))):
            assert time.monotonic() < deadline, self.told(run)
            time.sleep(0.1)

    def told(self, run: Path) -> str:
        """Everything the job of a run has written."""
        logs = [run / "slurm" / "output.log", *sorted(run.glob("slurm/*/*.log")), *sorted(run.glob("logs/*"))]
        return "\n".join(f"== {log}\n{log.read_text()[-3000:]}" for log in logs if log.exists())


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Four nodes; the last one, where this machine lets it, does not see the directory `unseen`."""
    unseen: Path | None = tmp_path_factory.mktemp("unseen")
    # Sockets have short names.
    temporary = tempfile.mkdtemp(prefix="s")
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    inside = ("unshare", "--mount", "sh", "-c", HIDE, str(unseen))
    if (
        shutil.which("unshare") is None
        or subprocess.run([*inside, "true"], capture_output=True, check=False).returncode
    ):
        unseen, inside = None, ()
    try:
        cluster.start(inside={cluster.num_nodes: inside})
        yield Slurm(cluster, temporary, unseen)
    finally:
        cluster.stop()
        shutil.rmtree(temporary, ignore_errors=True)


def test_a_sweep_is_an_array_and_a_run_outlives_a_signal_and_a_node_and_goes_on_in_another_job(
    slurm: Slurm, tmp_path: Path
):
    """Three jobs on one host at once; the one over two nodes, interrupted twice, follows the curve of the one alone.

    Its preflight measures all-reduce between the nodes. Its evaluation takes one node, and so a job of its own.
    """
    sound, broken = slurm.train(
        tmp_path / "array", "cluster.num_nodes=1", "stages.pretrain.training.optim.learning_rate=3e-3,1e30", "-m"
    )
    two_nodes = (
        "order=[pretrain,evaluate]",
        "cluster.num_nodes=2",
        "cluster.slurm.stage_nodes={evaluate: 1}",
        "cluster.slurm.spare_nodes=1",
        "cluster.slurm.sbatch=['--exclude=n4']",
        "cluster.slurm.preflight.node_pair_gb_per_second=1e-6",
        # A save after every step gives a test time to act in between, and changes no loss.
        "stages.pretrain.training.checkpoint_every_steps=1",
    )
    (run,) = slurm.train(tmp_path / "two", *two_nodes)
    first, second = (slurm.jobs(each)[0] for each in (sound, broken))
    assert (first.partition("_")[2], second.partition("_")[2]) == ("0", "1")
    assert first.partition("_")[0] == second.partition("_")[0]
    job, evaluation = slurm.jobs(run)
    assert slurm.cluster.job(evaluation)["Dependency"].startswith(f"afterok:{job}")
    assert slurm.train(tmp_path / "two", *two_nodes, f"resume={run}", code=2) == []
    assert "still in the queue" in slurm.output

    slurm.wait_for_step(run, 3)
    # What Slurm sends some time before a time limit, by `--signal=B:USR1@...`.
    slurm.cluster.command("scancel", "--batch", "--signal=USR1", job)
    attempt = next(run.glob("slurm/*-0-1"))
    assert [line.split()[0] for line in (attempt / "chosen").read_text().splitlines()] == ["n1", "n3"]
    reports = {each["node"]: each for each in map(json.loads, (attempt / "reports").read_text().splitlines())}
    assert set(reports) == {"n1", "n2", "n3"}
    assert all(each["faults"] == [] and "fast" in str(each["pairs"].values()) for each in reports.values())
    assert all("GPUs: the ranks run on CPUs" in each["unchecked"] for each in reports.values())
    # The other two come to their ends meanwhile.
    facts = slurm.wait_for_end(sound)
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), slurm.told(sound)
    facts = slurm.wait_for_end(broken)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "1:0", "0"), slurm.told(broken)
    assert "FloatingPointError" in slurm.ask("logs", broken, "--rank", "0")

    wait_for(lambda: len(records(run, "run_started")) == 2, ENOUGH_SECONDS, "the run goes on")
    told = slurm.ask("status", run)
    assert f"{job} RUNNING, then {evaluation} PENDING" in told and "pretrain, step" in told
    assert "queued again  1" in told
    slurm.wait_for_step(run, max(losses(run)) + 1)
    slurm.cluster.kill_node(3)
    wait_for(lambda: len(records(run, "run_started")) == 3, ENOUGH_SECONDS, "the run goes on without n3")
    wait_for(lambda: (run / "stages" / "pretrain" / "result.json").exists(), ENOUGH_SECONDS, "its training is done")
    # As long as Slurm waits for the dead node to report, the job it was part of is not over.
    slurm.cluster.command("scontrol", "update", "nodename=n3", "state=down", "reason=died")
    facts = slurm.wait_for_end(run)
    assert (facts["JobState"], facts["Restarts"], facts["ExitCode"]) == ("COMPLETED", "1", "0:0"), slurm.told(run)
    facts = slurm.wait_for_end(run, link=1)
    assert (facts["JobState"], facts["ExitCode"], facts["NumNodes"]) == ("COMPLETED", "0:0", "2"), slurm.told(run)

    told = slurm.ask("logs", run, "--lines=1000")
    for line in (
        "queued again: it continues from its newest checkpoint",
        "node n3 failed its checks: it did not report",
        "starts over without n3",
        "ranks go to n1 n2",
        "The rest, from stage evaluate on, is for another job, of 1 nodes.",
    ):
        assert line in told
    assert [each["world_size"] for each in records(run, "run_started")] == [2, 2, 2, 1]
    assert any("continues after step" in each["text"] for each in records(run, "message"))
    assert sorted(losses(run)) == list(range(1, 21))
    assert losses(run) == pytest.approx(losses(sound), abs=1e-5)
    assert [each["stage"] for each in records(run, "stage_ended")] == ["pretrain", "evaluate"]
    told = slurm.ask("status", run)
    assert f"{job} COMPLETED, then {evaluation} COMPLETED" in told and "finished" in told
    slurm.cluster.start_node(3)
    slurm.cluster.command("scontrol", "update", "nodename=n3", "state=resume")
    wait_for(lambda: slurm.cluster.node_states() == {"idle"}, 30, "the node is back")


def test_a_preempted_job_over_four_nodes_saves_and_goes_on_later_and_one_told_to_stop_does_not(
    slurm: Slurm, tmp_path: Path
):
    later = ("order=[pretrain,evaluate]", "cluster.slurm.stage_nodes={evaluate: 2}")
    (run,) = slurm.train(tmp_path, *FOUR_NODES, *later, "stages.pretrain.training.tokens=1e9")
    slurm.wait_for_step(run, 3)
    # Rank order follows the switches of the topology, not the names.
    chosen = [line.split()[0] for line in next(run.glob("slurm/*-0-1/chosen")).read_text().splitlines()]
    assert chosen == ["n1", "n3", "n2", "n4"]
    addresses = [(run / "logs" / f"rank-{rank:05d}.log").exists() for rank in range(4)]
    assert addresses == [True] * 4
    urgent = ("sbatch", "--partition=urgent", "--nodes=1", "--nodelist=n4", "--exclusive", "--output=/dev/null")
    assert slurm.cluster.command(*urgent, "--wrap=sleep 1")
    wait_for(lambda: slurm.facts(run)["Restarts"] == "1", ENOUGH_SECONDS, "the job was queued again")
    stopped_at = max(losses(run))
    assert stopped_at < 1000
    checkpoint = run / "stages" / "pretrain" / "checkpoints" / f"step-{stopped_at:08d}" / "manifest.json"
    assert checkpoint.exists(), slurm.told(run)
    slurm.wait_for_step(run, stopped_at + 1)
    messages = [each["text"] for each in records(run, "message")]
    assert f"stage pretrain continues after step {stopped_at}" in messages
    told = slurm.ask("stop", run)
    assert "saves and ends" in told and "has left the queue" in told
    assert slurm.facts(run, link=1)["JobState"] == "CANCELLED"
    facts = slurm.wait_for_end(run)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "75:0", "1"), slurm.told(run)
    assert json.loads((run / "status.json").read_text())["status"] == "stopped"
    assert "no job in the queue" in slurm.ask("stop", run, code=2)


QUEUED_AGAIN = 'if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then scontrol requeue $SLURM_JOB_ID; exit 75; fi'
WAITING = "#SBATCH --kill-on-invalid-dep=yes\n"


def test_a_job_follows_one_that_was_queued_again_and_leaves_the_queue_where_that_failed(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What chains rest on, with jobs of a line each: Slurm's own ways with `afterok` and `aftercorr`."""
    for name, value in slurm.variables.items():
        monkeypatch.setenv(name, value)

    def chain(first: str, *options: str, after: str) -> list[str]:
        files = [tmp_path / f"{len(first)}-{number}.sbatch" for number in (1, 2)]
        head = "#!/bin/bash\n#SBATCH --output=/dev/null\n#SBATCH --requeue\n"
        head += "".join(f"#SBATCH {option}\n" for option in options)
        files[0].write_text(f"{head}{first}\n")
        files[1].write_text(f"{head}{WAITING}exit 0\n")
        return submit_files(files, after=after)

    again, after_again = chain(QUEUED_AGAIN, after="afterok")
    failed, after_failed = chain("exit 1", after="afterok")
    array, after_array = chain("[ $SLURM_ARRAY_TASK_ID = 0 ]", "--array=0-1", after="aftercorr")
    expected = {
        again: "COMPLETED",
        after_again: "COMPLETED",
        failed: "FAILED",
        after_failed: "CANCELLED",
        f"{array}_0": "COMPLETED",
        f"{after_array}_0": "COMPLETED",
        f"{array}_1": "FAILED",
        f"{after_array}_1": "CANCELLED",
    }

    def states() -> dict[str, str]:
        return {job: slurm.cluster.job(job).get("JobState", "") for job in expected}

    wait_for(lambda: states() == expected, 60, f"{expected}")
    assert slurm.cluster.job(again)["Restarts"] == "1"


class TestUnsharedDirectory:
    @pytest.fixture
    def unseen(self, slurm: Slurm) -> Path:
        if slurm.unseen is None:
            pytest.skip("this machine does not let a test hide a directory from one node (unshare --mount)")
        return slurm.unseen

    def test_that_one_of_two_nodes_does_not_see_is_told(self, slurm: Slurm, unseen: Path):
        (run,) = slurm.train(unseen, "cluster.num_nodes=2", "cluster.slurm.sbatch=['--nodelist=n2,n4']")
        facts = slurm.wait_for_end(run)
        assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0"), slurm.told(run)
        assert f"error: the run directory {run} is not shared: n4 sees another directory" in slurm.told(run)

    def test_that_one_node_of_many_lacks_leaves_that_node_out_and_the_job_waits_for_others(
        self, slurm: Slurm, unseen: Path
    ):
        (run,) = slurm.train(unseen, *FOUR_NODES)
        wait_for(lambda: slurm.facts(run)["ExcNodeList"] == "n4", ENOUGH_SECONDS, "n4 is left out")
        assert "node n4 failed its checks" in slurm.told(run)
        assert "does not see the run directory" in slurm.told(run)
        wait_for(lambda: slurm.facts(run)["JobState"] == "PENDING", 30, "the job waits")
        assert "left out      n4" in slurm.ask("status", run)
        assert "has left the queue" in slurm.ask("stop", run)
        assert slurm.facts(run)["JobState"] == "CANCELLED"


def test_what_sbatch_refuses_is_told_in_its_own_words_and_what_is_written_can_be_submitted_later(
    slurm: Slurm, tmp_path: Path
):
    (run,) = slurm.train(
        tmp_path, "cluster.num_nodes=1", "cluster.slurm.partition=physics", "cluster.slurm.account=chemistry", code=2
    )
    assert "sbatch refused:" in slurm.output
    assert "Invalid account or account/partition combination specified" in slurm.output
    assert not (run / "slurm" / "job.json").exists()
    slurm.train(tmp_path, "cluster.num_nodes=1", "cluster.slurm.spare_nodes=8", code=2)
    assert "Node count specification invalid" in slurm.output

    (dry,) = slurm.train(tmp_path, "cluster.num_nodes=1", "action=dry_run", "cluster.slurm.sbatch=['--hold']")
    assert f"python -m slurm submit {dry}" in slurm.output
    assert "never submitted" in slurm.ask("status", dry)
    assert not (dry / "slurm" / "job.json").exists()
    slurm.ask("submit", dry)
    assert slurm.facts(dry)["JobState"] == "PENDING"
    assert "still in the queue" in slurm.ask("submit", dry, code=2)
    assert "has left the queue" in slurm.ask("stop", dry)
