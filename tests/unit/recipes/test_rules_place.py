"""Rules about ranks, memory, disks and files: what each refuses, and in which words."""

import re
from dataclasses import replace
from pathlib import Path

from check_samples import (
    BIG_DISK,
    FOUR_GPUS,
    LAPTOP,
    assert_told,
    changed,
    composed,
    full_size,
    layout,
    problems_of,
    rehearsal,
)

from conf import load
from recipes import check, rules_place
from recipes.machine import GIB


def test_cuda_without_a_gpu():
    assert_told(rehearsal(cluster__device="cuda"), "cluster.device", "no GPU here", "device=auto")


def test_why_there_is_no_gpu_is_passed_on():
    machine = replace(LAPTOP, gpu_fault="driver mismatch")
    assert_told(rehearsal(cluster__device="cuda"), "cluster.device", "driver mismatch", machine=machine)
    assert "driver mismatch" in str(check.warnings(rehearsal(), machine)[0])


def test_more_ranks_than_gpus():
    config = layout(rehearsal(), data=8)
    assert_told(config, "engine.mesh", "8 ranks", "4 GPUs", machine=FOUR_GPUS)


def test_more_ranks_than_cores_can_take():
    assert_told(layout(rehearsal(), data=9), "engine.mesh", "9 ranks", "2 CPU cores take at most 8")


def test_more_ranks_than_cores_are_warned_of():
    (warning,) = (
        each for each in check.warnings(layout(rehearsal(), tensor=2, data=2), LAPTOP) if "cores" in str(each)
    )
    assert "4 ranks share 2 CPU cores" in warning.message


def test_idle_gpus_are_warned_of():
    (warning,) = check.warnings(rehearsal(), FOUR_GPUS)
    assert "2 of 4 GPUs" in warning.message


def test_ranks_need_memory_to_start():
    machine = replace(LAPTOP, memory_bytes=4 * GIB)
    assert_told(layout(rehearsal(), data=8), "engine.mesh", "8 ranks need at least 4.9 GiB", machine=machine)


def test_full_size_does_not_fit_a_laptop():
    words = ("this machine has 16.0 GiB", "drop scale=full to rehearse")
    assert_told(changed(full_size(), cluster=composed("business_module").cluster), "engine.mesh", *words)


def test_what_does_not_fit_is_told_by_part_with_three_changes_that_would():
    config = changed(layout(full_size(), pipeline=4, context=2), engine__sequence_parallel=False)
    message = problems_of(config, BIG_DISK)["engine.mesh"]
    assert "H200 has 139.8 GiB" in message and "Pipeline rank 0 is the fullest" in message
    parts = re.findall(r"(weights|gradients|optimizer|activations|logits|working buffers|slack|NCCL) [\d.]+", message)
    assert len(parts) == 8
    changes = re.findall(r"((?:engine|stages)\.[^()]+) \(([\d.]+) GiB\)", message)
    assert len(changes) == 3
    for overrides, needed in changes:
        assert float(needed) < 139.8
        values = dict(word.split("=") for word in overrides.split())
        typed = {key.replace(".", "__"): _typed(value) for key, value in values.items()}
        at = changed(config, engine__mesh__data=None, **typed)
        assert problems_of(at, BIG_DISK).keys() == {"init"}, overrides  # the sample names none


def _typed(text):
    return {"true": True, "false": False}.get(text, int(text) if text.isdigit() else text)


def test_what_no_layout_holds_says_which_cluster_would():
    config = changed(layout(full_size(), tensor=8), cluster__num_nodes=1)
    message = problems_of(config, BIG_DISK)["engine.mesh"]
    found = re.search(r"No layout of 8 H200 holds this model; .* smallest cluster that does has (\d+)", message)
    assert found and int(found[1]) % 8 == 0 < int(found[1]) - 8


def test_least_memory_is_that_of_megatron_with_a_split_optimizer():
    config = check.resolve(layout(full_size(), tensor=8, pipeline=4, data=8), BIG_DISK)
    model = config.model
    layers = model.num_parameters - 2 * model.vocab_size * model.hidden_size
    first_rank = (layers // 4 + model.vocab_size * model.hidden_size) // 8
    assert rules_place.state_bytes(config) == first_rank * 6 + first_rank * 12 // 8


def test_checkpoints_fit_on_the_disk():
    machine = replace(LAPTOP, free_disk_bytes=lambda path: 40 * 2**20)
    size = composed("business_module").model.num_parameters * 16
    words = ("has 40.0 MiB free", "3 checkpoints", f"{size / 2**20:.1f} MiB", "keep_checkpoints")
    config = rehearsal(order=("specialise", "evaluate", "export"))
    assert_told(config, "runs_dir", *words, machine=machine)


def test_directories_are_not_files(tmp_path):
    (tmp_path / "file").touch()
    config = rehearsal(runs_dir=str(tmp_path / "file" / "runs"), data__cache_dir=str(tmp_path / "file"))
    assert_told(config, "runs_dir", "is a file")
    assert_told(config, "data.cache_dir", "is a file")


def test_directories_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    assert_told(rehearsal(runs_dir=str(tmp_path / "runs")), "runs_dir", "cannot be written", str(tmp_path))


def test_directories_are_on_a_disk():
    assert_told(rehearsal(runs_dir="s3://bucket/runs"), "runs_dir", "disk that every node sees")


def test_tokenizer_exists():
    assert_told(rehearsal(data__tokenizer="no/tokenizer.json"), "data.tokenizer", "no/tokenizer.json")
    assert_told(rehearsal(data__tokenizer="shipped:no"), "data.tokenizer", "shipped:tokenizer")
    assert_told(rehearsal(data__tokenizer="s3://bucket/tokenizer.json"), "data.tokenizer", "disk")


def test_every_id_of_the_tokenizer_has_a_row():
    assert_told(rehearsal(model__vocab_size=512), "model.vocab_size", "is 512", "ids up to 1023", "Nearest: 1024")


def test_sources_exist(tmp_path):
    def path_of(source):
        return problems_of(rehearsal(data__sources__business__path=source)).get("data.sources.business.path")

    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("text")
    assert "there is no" in path_of("no.txt")
    assert "nothing of this name" in path_of("shipped:no")
    assert "empty folder" in path_of("empty")
    assert path_of("text.txt") is None and path_of("s3://bucket/business") is None


def test_placeholders_are_refused():
    found = problems_of(composed("foundation", "cluster=h200_ray"), BIG_DISK)
    assert set(found) == {"data.tokenizer", *(f"data.sources.{name}.path" for name in rehearsal().data.sources)}
    assert "Set data.tokenizer=" in found["data.tokenizer"]


def test_local_is_one_machine():
    assert_told(rehearsal(cluster__num_nodes=2), "cluster.num_nodes", "this machine alone", "cluster=h200_ray")
    assert_told(rehearsal(cluster__address="auto"), "cluster.address", "kind=ray")


def test_ray_cluster_is_known():
    assert_told(full_size(cluster__address=None), "cluster.address", "address=auto")
    assert_told(full_size(cluster__ranks_per_node=None), "cluster.ranks_per_node", "Set it")


def test_ray_train_on_nodes_takes_the_data_axis_alone():
    assert_told(full_size(launcher="ray_train"), "launcher", "any order", "launcher=gang")
    assert "launcher" not in problems_of(rehearsal(launcher="ray_train"))


def test_tracking_online_without_a_key_is_warned_of(tmp_path):
    config = rehearsal(tracking__mode="online")
    bare = replace(LAPTOP, environment={"HOME": str(tmp_path)})
    assert "WANDB_API_KEY" in str(check.warnings(config, bare)[0])
    assert check.warnings(config, replace(bare, environment={"WANDB_API_KEY": "k"})) == []


class TestInit:
    def test_full_size_names_how_to_give_a_checkpoint(self):
        config = full_size(init="recipe:foundation")
        assert_told(config, "init", "no finished run of foundation", "init=RUNS_DIR/RUN", "recipe=foundation first")

    def test_full_size_finds_a_finished_run_of_its_model_only(self, tmp_path):
        config = full_size(init="recipe:foundation")
        run = tmp_path / "runs" / "foundation-20260131-142501-3f9a"
        run.mkdir(parents=True)
        (run / "status.json").write_text('{"status": "finished"}')
        load.write(composed("foundation"), run / "config.json")
        assert "init" in problems_of(config, BIG_DISK)
        load.write(composed("foundation", "scale=full"), run / "config.json")
        assert problems_of(config, BIG_DISK) == {}

    def test_rehearsal_rehearses_its_origin_first(self):
        assert problems_of(rehearsal(init="recipe:foundation")) == {}

    def test_recipe_exists_and_is_another(self):
        assert_told(rehearsal(init="recipe:fondation"), "init", "Did you mean 'foundation'")
        assert_told(rehearsal(init="recipe:business_module"), "init", "own recipe")

    def test_directory_exists(self):
        assert_told(rehearsal(init="foundation"), "init", "no directory", "Did you mean init=recipe:foundation")

    def test_directory_is_a_checkpoint(self, tmp_path):
        assert_told(rehearsal(init=str(tmp_path)), "init", "not a checkpoint", "manifest.json")

    def test_checkpoint_within_is_named(self, tmp_path):
        for step in (100, 200):
            folder = tmp_path / f"step-{step:08d}"
            folder.mkdir()
            (folder / "manifest.json").touch()
        assert_told(rehearsal(init=str(tmp_path)), "init", f"Did you mean init={tmp_path}/step-00000200?")

    def test_model_of_a_run_is_named(self, tmp_path):
        load.write(composed("foundation"), tmp_path / "config.json")
        (tmp_path / "stages" / "pretrain").mkdir(parents=True)
        (tmp_path / "stages" / "pretrain" / "result.json").write_text('{"checkpoint": "/runs/x", "seconds": 1}')
        assert_told(rehearsal(init=str(tmp_path)), "init", "Did you mean init=/runs/x?")

    def test_damaged_manifest_is_named(self, tmp_path):
        (tmp_path / "manifest.json").write_text("{}")
        assert_told(rehearsal(init=str(tmp_path)), "init", str(tmp_path), "manifest")

    def test_checkpoint_of_another_model_says_what_differs(self, tmp_path, monkeypatch):
        saved = replace(rehearsal().model, num_layers=6, name="other")
        manifest = type("Manifest", (), {"provenance": type("Provenance", (), {"model": saved})})
        monkeypatch.setattr(rules_place, "decode_manifest", lambda text, path: (manifest, ""))
        (tmp_path / "manifest.json").touch()
        assert problems_of(rehearsal(init=str(tmp_path))) == {
            "model.num_layers": f"is 4, and the model in {tmp_path} has 6. Set model.num_layers=6."
        }
