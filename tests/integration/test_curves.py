"""Runs follow one loss curve however they are launched, stopped, killed and continued."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from command_line import (
    TINY_FOUNDATION,
    TINY_MODEL,
    environment,
    has_step,
    held,
    is_alive,
    losses,
    pids_of_ranks,
    run_in,
    started,
    train,
    wait_for,
)

from train.loop import STOP_POLL_SECONDS

pytestmark = pytest.mark.timeout(420)
NEVER = "1000000000"
# Scoring after every step gives a test time to act in between, and changes no loss.
SLOW_STEPS = (*TINY_FOUNDATION, "stages.pretrain.training.validate_every_steps=1")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The loss curve of twenty steps on two data ranks, without interruption."""
    ended = train(tmp_path_factory.mktemp("reference"), *TINY_FOUNDATION, "engine.mesh.data=2")
    assert ended.code == 0, ended.output
    return losses(ended.run)


def test_two_runs_at_once_on_one_machine_and_both_launchers_and_engines_follow_the_same_curve(
    tmp_path: Path, reference: dict[int, float]
):
    layouts = {
        "gang": ("engine.mesh.tensor=2", "engine.mesh.pipeline=1"),
        "ray_train": ("engine=deepspeed", "engine.mesh.pipeline=2"),
    }
    logs = {name: tmp_path / f"{name}.txt" for name in layouts}
    first = started(tmp_path / "gang", *TINY_FOUNDATION, *layouts["gang"], log=logs["gang"])
    second = started(
        tmp_path / "ray_train", *TINY_FOUNDATION, *layouts["ray_train"], "launcher=ray_train", log=logs["ray_train"]
    )
    with first as one, second as two:
        codes = one.wait(300), two.wait(300)
    assert codes == (0, 0), logs["gang"].read_text() + logs["ray_train"].read_text()
    for name in layouts:
        run = run_in(tmp_path / name, "foundation")
        assert run is not None
        assert losses(run) == pytest.approx(reference, abs=1e-5)


def test_killed_runs_resume_to_the_same_curve_past_a_damaged_checkpoint(tmp_path: Path, reference: dict[int, float]):
    """SIGKILL of the driver in the middle, one flipped byte in the newest checkpoint, then the other engine."""
    overrides = (*SLOW_STEPS, "stages.pretrain.training.checkpoint_every_steps=4", "engine.mesh.data=2")
    with started(tmp_path, *overrides, log=tmp_path / "first.txt") as process:
        wait_for(lambda: has_step(tmp_path, "foundation", 9), 120, "step 9")
        run = run_in(tmp_path, "foundation")
        assert run is not None
        first, second = pids_of_ranks(run)
        with held(run, rank=1):
            os.kill(process.pid, signal.SIGKILL)
            wait_for(lambda: not is_alive(first), 20, "the rank that is not held is gone with its driver")
    wait_for(lambda: not is_alive(second), 20, "so is the other")
    assert max(losses(run)) < 20
    checkpoints = run / "stages" / "pretrain" / "checkpoints"
    assert len(list(checkpoints.glob("step-*/manifest.json"))) >= 2
    newest = sorted(checkpoints.glob("step-*/manifest.json"))[-1].parent
    file = newest / "weights" / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    ended = train(tmp_path, "recipe=foundation", "resume=latest", "engine=deepspeed", "engine.mesh.data=1")
    assert ended.code == 0, ended.output
    assert ended.run == run
    assert str(file) in ended.output
    assert "going back to" in ended.output
    assert losses(run) == pytest.approx(reference, abs=1e-5)
    assert sorted(losses(run)) == list(range(1, 21))


def test_ctrl_c_saves_exits_75_and_the_same_layout_resumes_to_the_last_bit(tmp_path: Path, reference: dict[int, float]):
    overrides = (*TINY_FOUNDATION, "engine.mesh.data=2")
    with started(
        tmp_path, *overrides, "stages.pretrain.training.checkpoint_every_steps=0", log=tmp_path / "o"
    ) as process:
        wait_for(lambda: has_step(tmp_path, "foundation", 3), 120, "step 3")
        run = run_in(tmp_path, "foundation")
        assert run is not None
        with held(run, rank=1):
            os.killpg(process.pid, signal.SIGINT)
            wait_for((run / "STOP").exists, 20, "the driver has passed it on")
            time.sleep(STOP_POLL_SECONDS)
        assert process.wait(60) == 75, (tmp_path / "o").read_text()
    at_stop = losses(run)
    assert max(at_stop) < 20
    assert f"resume={run}" in (tmp_path / "o").read_text()
    ended = train(tmp_path, "recipe=foundation", f"resume={run}")
    assert ended.code == 0, ended.output
    assert losses(run) == reference


def test_sigterm_while_the_foundation_is_rehearsed_saves_and_resuming_the_module_continues_it(tmp_path: Path):
    overrides = ("recipe=business_module", *TINY_MODEL, "order=[specialise]", "stages.specialise.training.tokens=2048")
    with started(tmp_path, *overrides, "tracking.mode=disabled", log=tmp_path / "o") as process:
        wait_for(lambda: has_step(tmp_path, "foundation", 3), 120, "step 3 of the foundation")
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == 75, (tmp_path / "o").read_text()
    foundation = run_in(tmp_path, "foundation")
    assert foundation is not None
    stopped_at = max(losses(foundation))
    again = tmp_path / "again"
    with started(tmp_path, "recipe=business_module", "resume=latest", log=again) as process:
        wait_for(lambda: f"continues after step {stopped_at}" in again.read_text(), 120, "the foundation continues")
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == 75, again.read_text()
    assert len(list(tmp_path.glob("foundation-*/config.json"))) == 1
    assert len(list(tmp_path.glob("business_module-*/config.json"))) == 1


def test_a_killed_rank_ends_the_run_soon_and_is_named(tmp_path: Path):
    endless = [each for each in TINY_FOUNDATION if not each.startswith("stages.pretrain.training.tokens")]
    with started(
        tmp_path, *endless, f"stages.pretrain.training.tokens={NEVER}", "engine.mesh.data=2", log=tmp_path / "o"
    ) as process:
        wait_for(lambda: has_step(tmp_path, "foundation", 2), 120, "step 2")
        run = run_in(tmp_path, "foundation")
        assert run is not None
        log = run / "logs" / "rank-00001.log"
        os.kill(pids_of_ranks(run)[1], signal.SIGKILL)
        status = run / "status.json"
        wait_for(lambda: json.loads(status.read_text())["status"] == "failed", 10, "the run has ended")
        assert process.wait(60) == 1
    output = (tmp_path / "o").read_text()
    assert "Rank 1 failed" in output
    assert str(log) in output


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a small disk needs root")
def test_a_full_disk_ends_the_run_with_the_reason_and_the_earlier_checkpoint_usable(
    tmp_path: Path, reference: dict[int, float]
):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    output = tmp_path / "output.txt"
    try:
        every_step = "stages.pretrain.training.checkpoint_every_steps=1"
        with started(disk, *SLOW_STEPS, every_step, "engine.mesh.data=1", log=output) as process:
            wait_for(lambda: has_step(disk, "foundation", 4), 120, "step 4")
            run = run_in(disk, "foundation")
            assert run is not None
            with held(run, rank=0), (disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
                while True:
                    filler.write(bytes(4096))
            assert process.wait(60) == 1
        assert "No space left" in output.read_text()
        (disk / "filler").unlink()
        ended = train(disk, "recipe=foundation", "resume=latest")
        assert ended.code == 0, ended.output
        assert losses(ended.run) == pytest.approx(reference, abs=1e-5)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


# Two nodes of one rank each on this host, with addresses of their own; ends when its standard input closes.
TWO_NODES = """
import sys
from ray.cluster_utils import Cluster
small = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args={**small, "num_cpus": 0})
for number in (2, 3):
    cluster.add_node(**small, node_ip_address=f"127.0.0.{number}", labels={"fabric": "pod-1"})
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def test_a_gang_spreads_over_the_nodes_of_a_ray_cluster_that_carry_its_labels(
    tmp_path: Path, reference: dict[int, float]
):
    with subprocess.Popen(
        [sys.executable, "-c", TWO_NODES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment() | {"RAY_USAGE_STATS_ENABLED": "0"},
    ) as nodes:
        assert nodes.stdin and nodes.stdout
        try:
            address = nodes.stdout.readline().strip()
            ended = train(
                tmp_path,
                *TINY_FOUNDATION,
                "cluster.kind=ray",
                f"cluster.address={address}",
                "cluster.device=cpu",
                "cluster.num_nodes=2",
                "cluster.ranks_per_node=1",
                "cluster.node_labels={fabric: pod-1}",
                "engine.mesh.pipeline=2",
            )
        finally:
            nodes.stdin.close()
            nodes.wait(30)
    assert ended.code == 0, ended.output
    assert losses(ended.run) == pytest.approx(reference, abs=1e-5)
