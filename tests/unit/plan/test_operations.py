"""Failures, checkpoints, power, traffic: the arithmetic around a step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from plan_samples import BUSY, LLAMA_70B

from conf.schema import HardwareConfig
from parallel.plan.hardware import GPUS, UnknownGpuError
from parallel.plan.operations import DAY, goodput, power, saving, site_gpu
from parallel.plan.throughput import step_time
from parallel.plan.traffic import traffic

SITE = HardwareConfig(
    gpu="H200",
    gpus_per_node=8,
    node_link_gb_per_s=450,
    network_gb_per_s=50,
    storage_gb_per_s=2,
    node_watts=4900,
    pue=1.3,
    dollars_per_gpu_hour=3.8,
    gpu_days_per_failure=2110,
    restart_minutes=15,
)


def test_site_has_the_links_of_its_machines_and_the_rest_of_the_gpu():
    gpu = site_gpu(replace(SITE, node_link_gb_per_s=25, network_gb_per_s=1.25, gpus_per_node=4))
    assert (gpu.nvlink_bandwidth, gpu.network_bandwidth, gpu.gpus_per_node) == (25e9, 1.25e9, 4)
    assert gpu.bf16_flops == GPUS["H200"].bf16_flops
    with pytest.raises(UnknownGpuError, match=r"(?s)H300.*bandwidth.*TDP"):
        site_gpu(replace(SITE, gpu="H300"))


def test_best_interval_is_that_of_young_and_daly():
    saves = saving(SITE, LLAMA_70B, 2048, 1800)
    between_failures = 2110 * DAY / 2048
    assert saves.best_interval_seconds == pytest.approx(math.sqrt(2 * saves.blocked_seconds * between_failures))
    assert saves.num_bytes == 14 * LLAMA_70B.num_parameters


def test_a_save_waits_for_the_one_before():
    slow = saving(replace(SITE, storage_gb_per_s=0.001), LLAMA_70B, 2048, 1800)
    assert slow.best_interval_seconds == slow.durable_seconds > 3600


def test_best_interval_has_the_best_goodput():
    saves = saving(SITE, LLAMA_70B, 2048, 1800)
    best = saves.best_interval_seconds
    assert goodput(SITE, 2048, saves, best) > max(goodput(SITE, 2048, saves, best * factor) for factor in (0.3, 3))


def test_goodput_of_published_failure_rates():
    # 2,048 GPUs at the rates of Llama 3 and of Meta's research clusters: an interruption in 24.7 and in 3.95 hours;
    # 15 minutes to recover and half of 20 minutes lost, 98.3 % and about 90 % of the time is training.
    saves = replace(saving(SITE, LLAMA_70B, 2048, 1200), blocked_seconds=0.0, durable_seconds=0.0)
    assert goodput(SITE, 2048, saves, 1200) == pytest.approx(0.983, abs=0.002)
    assert goodput(replace(SITE, gpu_days_per_failure=337), 2048, saves, 1200) == pytest.approx(0.90, abs=0.01)


def test_power_is_within_what_the_machines_can_draw():
    gpu = site_gpu(SITE)
    drawn = power(SITE, gpu, 256, step_time(LLAMA_70B, BUSY, gpu))
    assert drawn.most_mw == pytest.approx((256 * 700 + 32 * 4900) * 1.3 / 1e6)
    assert 0.5 * drawn.most_mw < drawn.mean_mw < drawn.most_mw


def test_traffic_of_each_axis_is_on_the_link_its_ranks_share():
    found = {each.axis: each for each in traffic(LLAMA_70B, BUSY, site_gpu(SITE))}
    assert {axis: each.link for axis, each in found.items()} == {
        "tensor": "node",
        "context": "node",
        "data": "network",
        "pipeline": "network",
    }
    assert {axis: each.stride for axis, each in found.items()} == {"tensor": 1, "context": 4, "data": 8, "pipeline": 64}
    # Gradients in fp32 and weights in bf16, of a quarter of the layers split over four: once around the ring.
    ring = (BUSY.data * BUSY.context - 1) / (BUSY.data * BUSY.context)
    layers = 20 * LLAMA_70B.layer_weights / 4
    assert found["data"].step_bytes == pytest.approx(6 * layers * ring)


def test_axes_of_one_rank_send_nothing():
    assert traffic(LLAMA_70B, replace(BUSY, tensor=1, context=1, pipeline=1, data=1), site_gpu(SITE)) == ()
