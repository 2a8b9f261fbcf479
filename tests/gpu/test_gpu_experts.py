"""Experts on one GPU; skipped where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_gpu_engine import MESH, MODEL, batch, engine_config

from bench.settings import OPTIM
from conf.schema import ExpertsConfig
from parallel.experts import grouped_linear, has_grouped_kernel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

MIXTURE = replace(
    MODEL,
    name="small-mixture",
    experts=ExpertsConfig(
        num_experts=8, num_experts_per_token=2, balance_loss=0.01, router_z_loss=0.001, capacity_factor=None
    ),
)


@pytest.mark.parametrize("ends", [[0, 100, 300], [300, 300, 300]])
def test_grouped_kernel_is_one_product_after_the_other(ends):
    tokens = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16)
    weights = torch.randn(3, 512, 256, device="cuda", dtype=torch.bfloat16)
    assert has_grouped_kernel(tokens, weights)
    expected = torch.cat(
        [tokens[start:end] @ weights[i].T for i, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))]
    )
    torch.testing.assert_close(grouped_linear(tokens, weights, torch.tensor(ends)), expected, rtol=2e-2, atol=1e-1)


@pytest.mark.usefixtures("world")
def test_mixture_in_bf16_follows_fp32_and_learns_its_batch_by_heart():
    from parallel.engine import make_engine
    from parallel.initial import InitialWeights
    from parallel.loss import CrossEntropy

    losses = {}
    for precision in ("fp32", "bf16"):
        engine = make_engine(MIXTURE, engine_config(precision), OPTIM, MESH, micro_batch=2)
        engine.load_weights(InitialWeights(MIXTURE, 0))
        losses[precision] = [engine.step([batch()], CrossEntropy(), learning_rate=1e-3).loss for _ in range(8)]
        engine.close()
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=0.02)
    assert losses["bf16"][-1] < losses["bf16"][0] - 0.5
