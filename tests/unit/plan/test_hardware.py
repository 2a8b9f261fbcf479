from __future__ import annotations

import pytest

from parallel.plan.hardware import GPUS, UnknownGpuError, gpu_named, with_power_limit


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("H100", "H100"),
        ("H100 (DGX)", "H100"),
        ("H100 80GB", "H100"),
        ("NVIDIA H200 SXM", "H200"),
        ("DGX-H100", "H100"),
        ("A100", "A100-80GB"),
        ("A100-SXM4-40GB", "A100-40GB"),
        ("a100_40", "A100-40GB"),
        ("8xH100", "H100"),
        ("GB200", "B200"),
        ("RTX 6000 Ada", "RTX 6000 Ada"),
    ],
)
def test_gpus_are_found_by_the_names_people_write(text, name):
    assert gpu_named(text) == GPUS[name]


@pytest.mark.parametrize("text", ["MI300X", "H100 PCIe", "H100 NVL", "TPU v5p", "H1000"])
def test_unknown_gpu_says_which_facts_to_give(text):
    with pytest.raises(UnknownGpuError, match=r"needs: dense bf16 and fp8 FLOP/s.*memory size.*NVLink.*TDP"):
        gpu_named(text)


def test_power_limit_and_memory_in_the_name_replace_facts_of_the_table():
    gpu = gpu_named("H100 96GB HBM2e 500W")
    assert gpu.tdp_watts == 500
    assert gpu.memory_bytes > GPUS["H100"].memory_bytes
    assert gpu.memory_bandwidth < GPUS["H100"].memory_bandwidth
    assert 0.7 < gpu.bf16_gemm_flops / GPUS["H100"].bf16_gemm_flops < 0.9


def test_limit_above_the_tdp_makes_nothing_faster():
    assert with_power_limit(GPUS["H100"], 900).bf16_gemm_flops == GPUS["H100"].bf16_gemm_flops


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_nothing_reaches_more_than_its_peak(gpu):
    assert max(*gpu.attention_flops, *gpu.flash_attention_flops, gpu.bf16_gemm_flops) < gpu.bf16_flops
    assert gpu.fp8_gemm_flops <= gpu.fp8_flops
