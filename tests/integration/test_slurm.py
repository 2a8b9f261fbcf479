"""Jobs of a real Slurm on this host: refused, chained, left out, preempted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import losses, records, wait_for
from slurm_runs import NEEDS_SLURM, Slurm

from slurm.submit import submit_files

pytestmark = NEEDS_SLURM
FOUR_NODES = ("cluster.num_nodes=4", "engine.mesh.pipeline=2")

QUEUED_AGAIN = 'if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then scontrol requeue $SLURM_JOB_ID; exit 75; fi'
WAITING = "#SBATCH --kill-on-invalid-dep=yes\n"


@pytest.fixture(scope="module")
def chained(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """Jobs of a line each that follow one another; the one that is queued again, and the state each must come to."""
    directory = tmp_path_factory.mktemp("chained")

    def chain(first: str, *options: str, after: str) -> list[str]:
        files = [directory / f"{len(first)}-{number}.sbatch" for number in (1, 2)]
        head = "#!/bin/bash\n#SBATCH --output=/dev/null\n#SBATCH --requeue\n"
        head += "".join(f"#SBATCH {option}\n" for option in options)
        files[0].write_text(f"{head}{first}\n")
        files[1].write_text(f"{head}{WAITING}exit 0\n")
        return submit_files(files, after=after)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in slurm.variables.items():
            patch.setenv(name, value)
        again, after_again = chain(QUEUED_AGAIN, after="afterok")
        failed, after_failed = chain("exit 1", after="afterok")
        array, after_array = chain("[ $SLURM_ARRAY_TASK_ID = 0 ]", "--array=0-1", after="aftercorr")
    return again, {
        again: "COMPLETED",
        after_again: "COMPLETED",
        failed: "FAILED",
        after_failed: "CANCELLED",
        f"{array}_0": "COMPLETED",
        f"{after_array}_0": "COMPLETED",
        f"{array}_1": "FAILED",
        f"{after_array}_1": "CANCELLED",
    }


@pytest.fixture(scope="module")
def unshared(slurm: Slurm) -> tuple[Path, Path] | None:
    """Runs in a directory that n4 does not see: one over two nodes, one over all four."""
    if slurm.unseen is None:
        return None
    (two,) = slurm.train(slurm.unseen, "cluster.num_nodes=2", "cluster.slurm.sbatch=['--nodelist=n2,n4']")
    (four,) = slurm.train(slurm.unseen, *FOUR_NODES)
    return two, four


# Jobs that mostly wait are handed in first, to wait while the commands of this test compute.
@pytest.mark.usefixtures("chained", "unshared")
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


class TestUnsharedDirectory:
    @pytest.fixture
    def runs(self, unshared: tuple[Path, Path] | None) -> tuple[Path, Path]:
        if unshared is None:
            pytest.skip("this machine does not let a test hide a directory from one node (unshare --mount)")
        return unshared

    def test_that_one_of_two_nodes_does_not_see_is_told(self, slurm: Slurm, runs: tuple[Path, Path]):
        run, _ = runs
        facts = slurm.wait_for_end(run)
        assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0"), slurm.told(run)
        assert f"error: the run directory {run} is not shared: n4 sees another directory" in slurm.told(run)

    def test_that_one_node_of_many_lacks_leaves_that_node_out_and_the_job_waits_for_others(
        self, slurm: Slurm, runs: tuple[Path, Path]
    ):
        _, run = runs
        slurm.wait_until(run, lambda: slurm.facts(run)["ExcNodeList"] == "n4")
        assert "node n4 failed its checks" in slurm.told(run)
        assert "does not see the run directory" in slurm.told(run)
        slurm.wait_until(run, lambda: slurm.facts(run)["JobState"] == "PENDING")
        assert "left out      n4" in slurm.ask("status", run)
        assert "has left the queue" in slurm.ask("stop", run)
        assert slurm.facts(run)["JobState"] == "CANCELLED"


def test_a_job_follows_one_that_was_queued_again_and_leaves_the_queue_where_that_failed(
    slurm: Slurm, chained: tuple[str, dict[str, str]]
):
    """What chains rest on, with jobs of a line each: Slurm's own ways with `afterok` and `aftercorr`."""
    again, expected = chained

    def states() -> dict[str, str]:
        return {job: slurm.cluster.job(job).get("JobState", "") for job in expected}

    wait_for(lambda: states() == expected, 60, f"{expected}")
    assert slurm.cluster.job(again)["Restarts"] == "1"


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
    slurm.wait_until(run, lambda: slurm.facts(run)["Restarts"] == "1")
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
