"""Rules about fp8: what each refuses, and in which words."""

from dataclasses import replace

import pytest
from check_samples import FOUR_GPUS, LAPTOP, assert_told, full_size, layout, problems_of, rehearsal

from conf.schema import ShapeConfig
from recipes.rules_precision import has_fp8
from recipes.stage_models import models_of


@pytest.mark.parametrize("gpu", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "B200", "NVIDIA GB200", "NVIDIA L40S", "L4"])
def test_gpus_with_fp8(gpu):
    assert has_fp8(gpu)


@pytest.mark.parametrize("gpu", ["NVIDIA A100-SXM4-80GB", "Tesla V100-SXM2-32GB", "NVIDIA A10G", "Tesla T4"])
def test_gpus_without_fp8(gpu):
    assert not has_fp8(gpu)


@pytest.mark.parametrize("precision", ["fp8", "fp8_rowwise"])
def test_fp8_is_refused_on_cpu_cores(precision):
    assert_told(rehearsal(engine__precision=precision), "engine.precision", "CPU cores", "engine.precision=bf16")


def test_fp8_is_refused_on_gpus_before_ada():
    machine = replace(FOUR_GPUS, gpus=("NVIDIA A100-SXM4-80GB",) * 4)
    assert_told(rehearsal(engine__precision="fp8"), "engine.precision", "A100", "has no fp8", machine=machine)


def test_fp8_is_refused_on_a_cluster_without_it():
    config = full_size(engine__precision="fp8")
    config = replace(config, budget=replace(config.budget, gpu="A100"))
    assert_told(config, "engine.precision", "A100 (budget.gpu)")


def test_fp8_is_allowed_on_hopper():
    assert "engine.precision" not in problems_of(full_size(engine__precision="fp8"), LAPTOP)
    assert "engine.precision" not in problems_of(rehearsal(engine__precision="fp8"), FOUR_GPUS)


def test_fp8_products_take_multiples_of_sixteen():
    config = rehearsal(engine__precision="fp8", model__ffn_hidden_size=1000)
    assert_told(config, "engine.precision", "model.ffn_hidden_size is 1000", "992 or 1008", machine=FOUR_GPUS)
    shape = ShapeConfig(
        num_layers=4, hidden_size=128, ffn_hidden_size=200, num_attention_heads=2, num_kv_heads=1, num_experts=None
    )
    config = rehearsal(engine__precision="fp8", stages__prune__shape=shape)
    assert_told(config, "engine.precision", "stages.prune.shape.ffn_hidden_size is 200", machine=FOUR_GPUS)


@pytest.mark.parametrize("tensor", [1, 2])
def test_smaller_models_that_are_found_have_products_that_fp8_takes_and_tensor_ranks_share(tensor):
    config = layout(rehearsal(engine__precision="fp8", stages__distill__student__ffn_multiple=1), tensor=tensor)
    for model in models_of(config).values():
        assert model.hidden_size % 16 == 0
        assert model.ffn_hidden_size % (16 * tensor) == 0
