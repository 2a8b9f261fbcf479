"""Which combinations of axes and options a backend has, and in which words the rest is refused."""

import importlib.util
from dataclasses import replace

import pytest
from check_samples import BIG_DISK, LAPTOP, assert_told, changed, composed, full_size, layout, problems_of, rehearsal

from recipes import check


def deepspeed(**values):
    return changed(composed("foundation", "engine=deepspeed"), **values)


def test_both_engines_rehearse_a_foundation_as_they_come():
    assert problems_of(rehearsal("foundation")) == {}
    assert problems_of(deepspeed()) == {}


def test_both_engines_train_a_foundation_at_full_size_as_they_come():
    config = full_size("foundation")
    both = composed("foundation", "engine=deepspeed", "cluster=h200_ray").engine
    assert problems_of(config, BIG_DISK) == {}
    assert problems_of(changed(config, engine=both), BIG_DISK) == {}


@pytest.mark.parametrize("backend", ["megatron", "deepspeed"])
def test_backend_that_is_not_installed_is_told_with_what_to_install(monkeypatch, backend):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    words = (f"{backend} is not installed", "pip install", "pyproject.toml")
    assert_told(deepspeed(engine__backend=backend), "engine.backend", *words)


@pytest.mark.parametrize("stage", [2, 3])
def test_megatron_splits_only_optimizer_state(stage):
    assert_told(rehearsal(engine__zero_stage=stage), "engine.zero_stage", "Megatron", "engine.zero_stage=1")
    assert "engine.zero_stage" not in problems_of(rehearsal(engine__zero_stage=1))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_splits_gradients_and_weights_only_without_a_pipeline(stage):
    assert problems_of(deepspeed(engine__zero_stage=stage)) == {}
    in_stages = layout(deepspeed(engine__zero_stage=stage), pipeline=2)
    if stage < 2:
        assert problems_of(in_stages) == {}
    else:
        assert_told(in_stages, "engine.zero_stage", "pipeline of 2 ranks", "engine.mesh.pipeline=1")


def test_deepspeed_does_not_add_up_gradients_in_bf16():
    config = deepspeed(engine__zero_stage=0, engine__precision="bf16")
    assert_told(config, "engine.zero_stage", "gradients", "engine.zero_stage=1")


def test_deepspeed_trains_dense_models_only():
    config = composed("foundation", "engine=deepspeed", "model=mixtral_8x7b")
    assert_told(config, "engine.backend", "has experts", "engine=megatron")


def test_deepspeed_does_not_interleave():
    config = layout(deepspeed(), pipeline=2, virtual_pipeline=2)
    assert_told(config, "engine.mesh.virtual_pipeline", "interleaved", "engine=megatron")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (rehearsal(engine__offload_optimizer="cpu"), ("Megatron", "engine=deepspeed")),
        (deepspeed(engine__offload_optimizer="cpu", engine__zero_stage=0), ("zero_stage 1 to 3", "are 0 and 1 ranks")),
        (layout(deepspeed(engine__offload_optimizer="cpu"), pipeline=2), ("no pipeline", "are 1 and 2 ranks")),
        (layout(deepspeed(engine__offload_optimizer="nvme"), pipeline=2), ("nvme needs", "no pipeline")),
    ],
)
def test_offloading_that_is_not_offered(config, words):
    assert_told(config, "engine.offload_optimizer", *words)


def test_a_disk_for_optimizer_state_is_looked_at_before_launch(tmp_path):
    def on_disk(directory):
        return deepspeed(engine__offload_optimizer="nvme", engine__offload_directory=directory)

    path = "engine.offload_directory"
    assert_told(on_disk(None), path, "engine.offload_directory=DIR")
    assert_told(on_disk(str(tmp_path / "absent")), path, "is no directory")
    assert problems_of(on_disk(str(tmp_path))) == {}
    full = replace(LAPTOP, free_disk_bytes=lambda path: 10_000)
    assert_told(on_disk(str(tmp_path)), path, "9.8 KiB free", "12 bytes a parameter", machine=full)
    for kind, words in (("tmpfs", "memory itself"), ("nfs4", "over a network"), ("ext4", None)):
        machine = replace(LAPTOP, file_system_of=lambda path, kind=kind: kind)
        told = [problem.message for problem in check.warnings(on_disk(str(tmp_path)), machine) if problem.path == path]
        assert [words in message for message in told] == ([True] if words else [])


@pytest.mark.parametrize("backend", ["megatron", "deepspeed"])
def test_fewer_micro_batches_than_pipeline_ranks_is_warned_of_with_the_bubble(backend):
    config = layout(rehearsal(engine__backend=backend, stages__specialise__training__global_batch=12), pipeline=4)
    warned = {each.path: each.message for each in check.warnings(config, LAPTOP)}
    # Three micro-batches pass four ranks: of six turns each rank works in three.
    assert "3 micro-batches" in warned["stages.specialise.training.global_batch"]
    assert "50 %" in warned["stages.specialise.training.global_batch"]


def test_deepspeed_neither_compiles_layers_nor_multiplies_in_fp8():
    assert_told(deepspeed(engine__compile=True), "engine.compile", "DeepSpeed", "engine=megatron")
    assert_told(deepspeed(engine__precision="fp8"), "engine.precision", "not offered with DeepSpeed")
