"""The engine on one GPU; skipped where there is none."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from conf.schema import EngineConfig, MeshConfig, ModelConfig, OptimConfig
from data.batch import Batch
from parallel.mesh import Mesh

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

MODEL = ModelConfig(
    name="small",
    num_layers=2,
    hidden_size=256,
    ffn_hidden_size=512,
    num_attention_heads=4,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=512,
    max_sequence_length=256,
    rope_theta=10_000.0,
    norm_epsilon=1e-5,
    init_std=0.02,
    tied_embeddings=False,
)
OPTIM = OptimConfig(
    learning_rate=1e-3,
    final_learning_rate_ratio=0.1,
    schedule="cosine",
    warmup_fraction=0.0,
    decay_fraction=0.0,
    beta1=0.9,
    beta2=0.95,
    epsilon=1e-8,
    weight_decay=0.1,
    clip_grad_norm=1.0,
)
MESH = Mesh()


def engine_config(precision: str, **changes: object) -> EngineConfig:
    settings = {
        "backend": "megatron",
        "mesh": MeshConfig(tensor=1, context=1, pipeline=1, virtual_pipeline=1, data=1),
        "precision": precision,
        "sequence_parallel": False,
        "zero_stage": 1,
        "offload_optimizer": "none",
        "overlap": True,
        "recompute": "none",
    }
    return EngineConfig(**(settings | changes))  # type: ignore[arg-type]


def batch() -> Batch:
    random = np.random.default_rng(0)
    rows = random.integers(MODEL.vocab_size, size=(2, 257))
    return Batch(
        tokens_BS=rows[:, :-1],
        labels_BS=rows[:, 1:],
        loss_mask_BS=np.ones((2, 256), dtype=np.float32),
        position_ids_BS=np.tile(np.arange(256), (2, 1)),
        sample_ids_B=np.arange(2),
    )


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    from parallel import groups

    meeting: Path = tmp_path_factory.mktemp("world") / "store"
    groups.open_world(torch.distributed.FileStore(str(meeting), 1), rank=0, world_size=1)
    groups.enter_mesh(MESH)
    yield
    groups.shut_down()


def losses(config: EngineConfig, num_steps: int = 8) -> list[float]:
    from parallel.engine import make_engine
    from parallel.initial import InitialWeights
    from parallel.loss import CrossEntropy

    engine = make_engine(MODEL, config, OPTIM, MESH, micro_batch=2)
    engine.load_weights(InitialWeights(MODEL, 0))
    found = [engine.step([batch()], CrossEntropy(), learning_rate=1e-3).loss for _ in range(num_steps)]
    assert engine.peak_memory_bytes() > 4 * engine.num_parameters
    engine.close()
    return found


def test_bf16_follows_fp32_and_learns_its_batch_by_heart():
    single, half = losses(engine_config("fp32")), losses(engine_config("bf16"))
    assert half == pytest.approx(single, abs=0.02)
    assert half[-1] < half[0] - 0.5


@pytest.mark.parametrize("changes", [{"recompute": "full"}, {"recompute": "selective"}, {"overlap": False}], ids=str)
def test_saving_memory_or_waiting_does_not_change_the_numbers(changes):
    assert losses(engine_config("bf16", **changes)) == pytest.approx(losses(engine_config("bf16")), abs=1e-3)


@pytest.mark.parametrize(
    "changes",
    [{"zero_stage": 1}, {"zero_stage": 2}, {"zero_stage": 3}, {"zero_stage": 2, "offload_optimizer": "cpu"}],
    ids=str,
)
def test_deepspeed_does_not_change_the_numbers(changes):
    found = losses(engine_config("bf16", backend="deepspeed", **changes))
    assert found == pytest.approx(losses(engine_config("bf16")), abs=1e-3)


@pytest.mark.parametrize("num_queries", [512, 128])
def test_attention_kernel_is_causal_attention(num_queries):
    from parallel.attention import attend_causally

    torch.manual_seed(0)
    query = torch.randn(2, 8, num_queries, 128, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, 2, 2, 512, 128, device="cuda", dtype=torch.bfloat16).unbind(0)
    output = attend_causally(query, key, value, 1 / math.sqrt(128))

    key, value = (tensor.double().repeat_interleave(4, dim=1) for tensor in (key, value))
    scores = query.double() @ key.transpose(-1, -2) / math.sqrt(128)
    places = torch.arange(512, device="cuda")
    seen = places[None, :] <= places[512 - num_queries :, None]
    expected = scores.masked_fill(~seen, -math.inf).softmax(-1) @ value
    torch.testing.assert_close(output.double(), expected, atol=2e-2, rtol=2e-2)
