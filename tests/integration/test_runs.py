"""Whole runs through the command line: what a user types, what is on the screen, what is left on disk."""

from __future__ import annotations

import json
import os
import re
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
    TINY_VARIANTS,
    Ended,
    environment,
    has_step,
    held,
    is_alive,
    losses,
    pids_of_ranks,
    records,
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
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(runs_dir: Path) -> Ended:
    """A business rehearsal where there is no foundation yet, on a host where another Ray cluster is said to run."""
    ended = train(
        runs_dir,
        "recipe=business_module",
        *TINY_MODEL,
        *TINY_VARIANTS,
        "stages.specialise.training.tokens=10240",
        "stages.specialise.training.validation_tokens=2000",
        "stages.evaluate.tokens=2000",
        "tracking.mode=offline",
        seconds=300,
        RAY_ADDRESS="127.0.0.1:9",
    )
    assert ended.code == 0, ended.output
    return ended


def test_a_module_rehearses_its_foundation_first_and_ends_with_everything_promised(whole: Ended, runs_dir: Path):
    foundation = run_in(runs_dir, "foundation")
    assert foundation is not None
    assert "Rehearsal of business_module" in whole.output
    assert "256 x H200" in whole.output
    assert "There is no finished foundation run" in whole.output
    assert (whole.run / "report.html").stat().st_size > 10_000
    assert list((whole.run / "wandb").rglob("*.wandb"))
    assert json.loads((whole.run / "status.json").read_text())["status"] == "finished"
    assert json.loads((whole.run / "config.json").read_text())["init"].startswith(str(foundation))
    scored = {(each["model"], each["source"]) for each in records(whole.run, "evaluation")}
    assert {("init", "business"), ("specialise", "business"), ("recover", "business")} <= scored


def test_variants_are_really_smaller_and_say_where_they_come_from(whole: Ended):
    """Shapes as transformers reads them, lineage by hash, and promises beside what was reached."""
    from train.checkpoint import Checkpoint

    sizes = {
        name: json.loads((whole.run / "export" / name / "config.json").read_text())["hidden_size"]
        for name in ("specialise", "recover", "quantise", "distill")
    }
    assert sizes["distill"] < sizes["specialise"] and sizes["quantise"] == sizes["recover"]
    made = {
        stage: Checkpoint.open(Path(json.loads(file.read_text())["checkpoint"]))
        for stage in ("specialise", "prune", "recover", "continued", "distill", "quantise")
        if (file := whole.run / "stages" / stage / "result.json").exists()
    }
    for child, parents in {
        "prune": ["specialise"],
        "recover": ["prune", "specialise"],
        "continued": ["specialise"],
        "distill": ["specialise"],
        "quantise": ["recover"],
    }.items():
        found = [parent.manifest_sha256 for parent in made[child].manifest.provenance.parents]
        assert found == [made[parent].manifest_sha256 for parent in parents], child
    card = (whole.run / "export" / "quantise" / "README.md").read_text()
    for stage in ("specialise", "prune", "recover", "quantise"):
        assert made[stage].manifest_sha256 in card and f"- `{stage}` of {whole.run.name}" in card, stage
    parameters = {stage: checkpoint.manifest.provenance.model.num_parameters for stage, checkpoint in made.items()}
    assert parameters["recover"] <= 0.7 * parameters["specialise"]
    targets = {each["name"]: each for each in records(whole.run, "target")}
    assert targets["pruning: parameters removed"]["met"]
    assert {"pruning: accuracy kept", "INT8: accuracy kept", "distillation: size"} <= targets.keys()
    speeds = {each["model"]: each for each in records(whole.run, "speed")}
    assert speeds.keys() == {"specialise", "recover", "quantise", "distill"}
    assert speeds["distill"]["disk_bytes"] < speeds["quantise"]["disk_bytes"] < speeds["recover"]["disk_bytes"]
    assert all(each["decode_seconds"]["median"] > 0 for each in speeds.values()) and "INT8: speed" in targets
    assert [each["part"] for each in records(whole.run, "quantisation")] == [
        "layer 0",
        "layer 1",
        "layer 2",
        "layer 3",
        "all",
    ]
    assert len(records(whole.run, "candidate")) == 3


def test_losses_of_both_recipes_fall(whole: Ended, runs_dir: Path):
    foundation = run_in(runs_dir, "foundation")
    assert foundation is not None
    curve = losses(foundation)
    first, last = min(curve), max(curve)
    assert curve[last] < curve[first]


def test_the_exported_model_predicts_in_transformers_as_it_did_here(whole: Ended):
    """Logits on real text: loss by document of our evaluation against the exported model's own."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from data.held_out import held_out_batches
    from data.shards import Dataset

    model = AutoModelForCausalLM.from_pretrained(whole.run / "export" / "specialise").eval()
    tokenizer = AutoTokenizer.from_pretrained(whole.run / "export" / "specialise")
    text = "The economy of the country"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    dataset = Dataset.open(Path(json.loads((whole.run / "datasets.json").read_text())["business"]))
    loss, count = 0.0, 0.0
    with torch.no_grad():
        for batch in held_out_batches(dataset, tokens=2000, sequence_length=64, micro_batch=4):
            logits = model(torch.from_numpy(batch.tokens_BS)).logits.double()
            each = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), torch.from_numpy(batch.labels_BS).flatten(), reduction="none"
            )
            mask = torch.from_numpy(batch.loss_mask_BS).flatten().double()
            loss, count = loss + float(each @ mask), count + float(mask.sum())
    ours = next(
        each
        for each in records(whole.run, "evaluation")
        if each["model"] == "specialise" and each["source"] == "business"
    )
    assert count == ours["num_tokens"]
    assert loss / count == pytest.approx(ours["loss"], abs=1e-5)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The loss curve of twenty steps on one rank, without interruption."""
    ended = train(tmp_path_factory.mktemp("reference"), *TINY_FOUNDATION, "engine.mesh.data=1")
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


def test_ctrl_c_saves_exits_75_and_the_same_layout_resumes_to_the_last_bit(tmp_path: Path):
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
    again = train(tmp_path / "whole", *overrides)
    assert losses(run) == losses(again.run)


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


def test_a_rank_that_raises_ends_the_run_with_its_own_traceback(tmp_path: Path):
    ended = train(tmp_path, *TINY_FOUNDATION, "stages.pretrain.training.optim.learning_rate=1e30", "engine.mesh.data=2")
    assert ended.code == 1
    assert "FloatingPointError" in ended.output
    assert "Traceback" in ended.output
    assert re.search(r"log +\S+rank-0000[01]\.log", ended.output)


def test_a_checkpoint_copied_out_of_its_run_is_enough_to_start_from(whole: Ended, tmp_path: Path):
    copied = tmp_path / "copied"
    shutil.copytree(json.loads((whole.run / "config.json").read_text())["init"], copied)
    ended = train(
        tmp_path / "runs",
        "recipe=business_module",
        "order=[specialise,evaluate,export]",
        f"init={copied}",
        *TINY_MODEL,
        "stages.specialise.training.tokens=2048",
        "stages.specialise.training.validation_tokens=2000",
        "stages.evaluate.tokens=2000",
        "tracking.mode=disabled",
    )
    assert ended.code == 0, ended.output
    assert "no n-gram beside init" in ended.output
    assert (ended.run / "export" / "specialise" / "model.safetensors").exists()


def test_a_checkpoint_of_another_model_is_refused_before_launch(whole: Ended, tmp_path: Path):
    init = json.loads((whole.run / "config.json").read_text())["init"]
    ended = train(tmp_path, "recipe=business_module", f"init={init}", *TINY_MODEL, "model.num_layers=2")
    assert ended.code == 2
    assert "num_layers" in ended.output
    assert not list(tmp_path.glob("business_module-*"))


def test_a_run_directory_that_cannot_be_made_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("not a directory")
    ended = train(tmp_path, *TINY_FOUNDATION, f"runs_dir={tmp_path / 'file' / 'runs'}")
    assert ended.code == 2
    assert "runs_dir" in ended.output


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a small disk needs root")
def test_a_full_disk_ends_the_run_with_the_reason_and_the_earlier_checkpoint_usable(
    tmp_path: Path, reference: dict[int, float]
):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    cache, output = f"data.cache_dir={tmp_path / 'cache'}", tmp_path / "output.txt"
    try:
        every_step = "stages.pretrain.training.checkpoint_every_steps=1"
        with started(disk, *SLOW_STEPS, cache, every_step, "engine.mesh.data=1", log=output) as process:
            wait_for(lambda: has_step(disk, "foundation", 4), 120, "step 4")
            run = run_in(disk, "foundation")
            assert run is not None
            with held(run, rank=0), (disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
                while True:
                    filler.write(bytes(4096))
            assert process.wait(60) == 1
        assert "No space left" in output.read_text()
        (disk / "filler").unlink()
        ended = train(disk, "recipe=foundation", "resume=latest", cache)
        assert ended.code == 0, ended.output
        assert losses(ended.run) == pytest.approx(reference, abs=1e-5)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_sweeps_run_one_after_another_each_in_its_own_directory(tmp_path: Path):
    ended = train(
        tmp_path, *TINY_FOUNDATION, "order=[pretrain]", "stages.pretrain.training.tokens=1024", "seed=1,2", "-m"
    )
    assert ended.code == 0, ended.output
    assert len(list(tmp_path.glob("foundation-*/report.html"))) == 2


def test_checking_is_fast_to_import_and_loads_no_framework(tmp_path: Path):
    code = (
        "import sys; sys.argv=['train','recipe=foundation','action=check']\n"
        "import runpy\n"
        "try: runpy.run_module('train', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch','ray','megatron','deepspeed','wandb','matplotlib','transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


NO_PORTS = 'ip link set lo up && echo "50000 50007" > /proc/sys/net/ipv4/ip_local_port_range && exec "$@"'


@pytest.mark.skipif(shutil.which("ip") is None or shutil.which("unshare") is None, reason="needs ip and unshare")
def test_a_machine_without_free_ports_is_told_so_before_launch(tmp_path: Path):
    """In a network namespace of its own that has eight ports to give."""
    inside = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", NO_PORTS, "sh"]
    if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let a user make network namespaces")
    done = subprocess.run(
        [*inside, sys.executable, "-m", "train", f"runs_dir={tmp_path / 'runs'}", *TINY_FOUNDATION],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "only 8 TCP ports of this machine are free" in done.stderr
    assert not (tmp_path / "runs").exists()


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


def test_a_ray_cluster_that_does_not_answer_is_told_at_once(tmp_path: Path):
    overrides = ("cluster.kind=ray", "cluster.ranks_per_node=1", "cluster.device=cpu", "cluster.address=127.0.0.1:9")
    ended = train(tmp_path, *TINY_FOUNDATION, *overrides, seconds=60)
    assert ended.code == 2, ended.output
    assert "cannot use the Ray cluster at 127.0.0.1:9" in ended.output
