"""What the benches of a step and the tests on a GPU have in common: model, optimizer, engine and batch."""

from __future__ import annotations

from typing import Any

import numpy as np

from conf.schema import EngineConfig, MeshConfig, ModelConfig, OptimConfig
from data.batch import Batch

OPTIM = OptimConfig(
    learning_rate=1e-4,
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


def dense_model(**sizes: Any) -> ModelConfig:
    """A dense decoder of these sizes, untied."""
    rest: dict[str, Any] = {"rope_theta": 500_000.0, "norm_epsilon": 1e-5, "init_std": 0.02, "tied_embeddings": False}
    return ModelConfig(**(rest | sizes))


def engine_of(*, mesh: dict[str, int] | None = None, **changes: Any) -> EngineConfig:
    """Megatron on one rank in float32, nothing split and nothing overlapped, but for what is changed."""
    axes = {"tensor": 1, "context": 1, "pipeline": 1, "virtual_pipeline": 1, "data": 1} | (mesh or {})
    plain: dict[str, Any] = {
        "backend": "megatron",
        "mesh": MeshConfig(**axes),
        "precision": "fp32",
        "sequence_parallel": False,
        "zero_stage": 0,
        "offload_optimizer": "none",
        "overlap": False,
        "recompute": "none",
    }
    return EngineConfig(**(plain | changes))


def random_batches(model: ModelConfig, *, count: int, rows: int, tokens: int) -> list[Batch]:
    """Micro-batches of random tokens, the same in every call, of which every token counts."""
    ids = np.random.default_rng(0).integers(model.vocab_size, size=(count, rows, tokens + 1))
    return [
        Batch(
            tokens_BS=each[:, :-1].copy(),
            labels_BS=each[:, 1:].copy(),
            loss_mask_BS=np.ones((rows, tokens), dtype=np.float32),
            position_ids_BS=np.tile(np.arange(tokens), (rows, 1)),
            sample_ids_B=np.arange(rows),
        )
        for each in ids
    ]
