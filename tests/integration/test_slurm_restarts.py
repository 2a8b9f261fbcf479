"""A run of a real Slurm on this host that is interrupted in every way, beside the jobs of a sweep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import held, losses, records, wait_for
from slurm_runs import NEEDS_SLURM, Slurm

pytestmark = NEEDS_SLURM


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
        "cluster.slurm.before=['echo in $A_VARIABLE_NOBODY_SETS front']",
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
    with held(run, rank=0):
        # What Slurm sends some time before a time limit, by `--signal=B:USR1@...`.
        slurm.cluster.command("scancel", "--batch", "--signal=USR1", job)
        slurm.wait_until(run, (run / "STOP").exists)
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

    slurm.wait_until(run, lambda: len(records(run, "run_started")) == 2)
    told = slurm.ask("status", run)
    assert f"{job} RUNNING, then {evaluation} PENDING" in told and "pretrain, step" in told
    assert "queued again  1" in told
    slurm.wait_for_step(run, max(losses(run)) + 1)
    with held(run, rank=0):
        slurm.cluster.kill_node(3)
    slurm.wait_until(run, lambda: len(records(run, "run_started")) == 3)
    slurm.wait_until(run, (run / "stages" / "pretrain" / "result.json").exists)
    # As long as Slurm waits for the dead node to report, the job it was part of is not over.
    slurm.cluster.command("scontrol", "update", "nodename=n3", "state=down", "reason=died")
    facts = slurm.wait_for_end(run)
    assert (facts["JobState"], facts["Restarts"], facts["ExitCode"]) == ("COMPLETED", "1", "0:0"), slurm.told(run)
    facts = slurm.wait_for_end(run, link=1)
    assert (facts["JobState"], facts["ExitCode"], facts["NumNodes"]) == ("COMPLETED", "0:0", "2"), slurm.told(run)

    told = slurm.ask("logs", run, "--lines=1000")
    for line in (
        "in front",
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
