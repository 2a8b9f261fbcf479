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

from conf import load
from train.loop import STOP_POLL_SECONDS

pytestmark = pytest.mark.timeout(420)


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


# Where a module starts from, in 20 steps instead of 1,270.
SHORT_FOUNDATION = """# @package _global_
defaults: [foundation, _self_]
name: short_foundation
stages:
  pretrain: {training: {tokens: 10240, validation_tokens: 2000}}
  evaluate: {tokens: 2000}
"""


@pytest.fixture(scope="module")
def whole(runs_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """A business rehearsal where there is no foundation yet, on a host where another Ray cluster is said to run."""
    own_recipes = tmp_path_factory.mktemp("conf")
    (own_recipes / "recipe").mkdir()
    (own_recipes / "recipe" / "short_foundation.yaml").write_text(SHORT_FOUNDATION)
    ended = train(
        runs_dir,
        "recipe=business_module",
        "init=recipe:short_foundation",
        *TINY_MODEL,
        *TINY_VARIANTS,
        "stages.specialise.training.tokens=10240",
        "stages.specialise.training.validation_tokens=2000",
        "stages.evaluate.tokens=2000",
        "tracking.mode=offline",
        f"--config-dir={own_recipes}",
        seconds=300,
        RAY_ADDRESS="127.0.0.1:9",
    )
    assert ended.code == 0, ended.output
    return ended


def test_a_module_rehearses_its_foundation_first_and_ends_with_everything_promised(whole: Ended, runs_dir: Path):
    foundation = run_in(runs_dir, "short_foundation")
    assert foundation is not None
    assert "Rehearsal of business_module" in whole.output
    assert "256 x H200" in whole.output
    assert "There is no finished short_foundation run" in whole.output
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
    foundation = run_in(runs_dir, "short_foundation")
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


def test_a_rank_that_raises_ends_the_run_with_its_own_traceback(tmp_path: Path):
    ended = train(tmp_path, *TINY_FOUNDATION, "stages.pretrain.training.optim.learning_rate=1e30", "engine.mesh.data=2")
    assert ended.code == 1
    assert "FloatingPointError" in ended.output
    assert "Traceback" in ended.output
    assert re.search(r"log +\S+rank-0000[01]\.log", ended.output)


@pytest.fixture(scope="module")
def copied(whole: Ended, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """A run from a checkpoint that was copied out of its own, with documents apart and what teachers can give."""
    folder = tmp_path_factory.mktemp("copied")
    copied = folder / "model"
    shutil.copytree(json.loads((whole.run / "config.json").read_text())["init"], copied)
    ended = train(
        folder / "runs",
        "recipe=business_module",
        # Besides, a teacher whose logits are written down and read, and one whose hidden states are learned.
        "order=[specialise,logits,distill,recover,evaluate,export]",
        "+stages.logits={kind: logits, stage: distill, stored_as: fp16, location: null}",
        "stages.distill.distillation={logits: logits, top_k: 8}",
        "stages.recover.distillation.hidden_states={layers: {0: 3}, distance: mse, weight: 1.0}",
        f"init={copied}",
        *TINY_MODEL,
        *TINY_VARIANTS,
        "stages.specialise.training.tokens=2048",
        "stages.specialise.training.validation_tokens=2000",
        "stages.evaluate.tokens=2000",
        "tracking.mode=disabled",
        "data.reset_at_documents=true",
    )
    assert ended.code == 0, ended.output
    return ended


def test_a_checkpoint_copied_out_of_its_run_is_enough_to_start_from_also_with_documents_apart(copied: Ended):
    assert "no n-gram beside init" in copied.output
    steps = {
        stage: [each for each in records(copied.run, "step") if each["stage"] == stage]
        for stage in ("distill", "recover")
    }
    assert all(0 < step["metrics"]["divergence"] for step in steps["distill"])
    assert all(0 < step["metrics"]["hidden_states"] < step["loss"] for step in steps["recover"])
    assert (copied.run / "logits" / "logits" / "logits.json").exists()
    assert (copied.run / "export" / "specialise" / "model.safetensors").exists()
    assert "document by document" in (copied.run / "logs" / "rank-00000.log").read_text(), "documents were kept apart"
    # And so FLOPs are those of the documents, by the rows of rank 0.
    model = load.read(copied.run / "config.json").model
    steps = [step for step in records(copied.run, "step") if step["stage"] == "specialise"]
    flops = [2e12 * step["model_tflops"] / step["tokens_per_second"] for step in steps]
    assert min(flops) < max(flops) <= model.train_flops_per_token(64) * (1 + 1e-9)
    assert min(flops) > model.train_flops_per_token(1)


def test_a_teacher_on_ranks_of_its_own_stops_goes_on_and_fails_with_its_students(copied: Ended, tmp_path: Path):
    """Ctrl-C, another mesh of the teacher, then SIGKILL of one of its ranks; it says what was written down of it."""
    specialised = json.loads((copied.run / "stages" / "specialise" / "result.json").read_text())["checkpoint"]
    overrides = (
        "recipe=business_module",
        "order=[distill]",
        f"init={specialised}",
        "stages.distill.distillation={teacher: init, top_k: 8, service: {mesh: {data: 1}}}",
        *TINY_MODEL,
        *TINY_VARIANTS,
        "stages.distill.training.validate_every_steps=1",  # so that there is time to act after each
        "tracking.mode=disabled",
        "data.reset_at_documents=true",
        "engine.mesh.data=1",
    )
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    with started(tmp_path, *overrides, log=first) as process:
        wait_for(lambda: has_step(tmp_path, "business_module", 1), 120, "step 1")
        run = run_in(tmp_path, "business_module")
        assert run is not None
        pids = [*pids_of_ranks(run), *pids_of_ranks(run, "teacher")]
        with held(run, rank=0):
            os.killpg(process.pid, signal.SIGINT)
            wait_for((run / "STOP").exists, 20, "the driver has passed it on")
            time.sleep(STOP_POLL_SECONDS)
        assert process.wait(60) == 75, first.read_text()
    assert len(pids) == 2
    wait_for(lambda: not any(map(is_alive, pids)), 10, "the teacher is gone with its student")
    stopped_at = max(losses(run, "distill"))
    wider = "stages.distill.distillation.service={mesh: {tensor: 2}}"
    with started(tmp_path, "recipe=business_module", "resume=latest", wider, log=second) as process:
        wait_for(lambda: has_step(tmp_path, "business_module", stopped_at + 1), 120, "a step more")
        with held(run, rank=0):
            os.kill(pids_of_ranks(run, "teacher")[1], signal.SIGKILL)
            status = run / "status.json"
            wait_for(lambda: json.loads(status.read_text())["status"] == "failed", 10, "the run has ended")
        assert process.wait(60) == 1
    assert "Teacher 1 failed" in second.read_text()
    assert str(run / "logs" / "teacher-00001.log") in second.read_text()
    taught, written = losses(run, "distill"), losses(copied.run, "distill")
    assert sorted(taught) == list(range(1, len(taught) + 1)) and len(taught) > stopped_at
    assert taught == pytest.approx({step: written[step] for step in taught}, abs=1e-5)


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


def test_a_ray_cluster_that_does_not_answer_is_told_at_once(tmp_path: Path):
    overrides = ("cluster.kind=ray", "cluster.ranks_per_node=1", "cluster.device=cpu", "cluster.address=127.0.0.1:9")
    ended = train(tmp_path, *TINY_FOUNDATION, *overrides, seconds=60)
    assert ended.code == 2, ended.output
    assert "cannot use the Ray cluster at 127.0.0.1:9" in ended.output
