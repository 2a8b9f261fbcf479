"""A small model with unequal sizes everywhere."""

from __future__ import annotations

from dataclasses import replace

from conf.schema import ExpertsConfig, ModelConfig

MODEL = ModelConfig(
    name="small",
    num_layers=3,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=8,
    num_kv_heads=4,
    head_dim=6,
    vocab_size=32,
    max_sequence_length=16,
    rope_theta=10_000.0,
    norm_epsilon=1e-5,
    init_std=0.02,
    tied_embeddings=False,
)
MIXTURE = replace(
    MODEL,
    name="small-mixture",
    experts=ExpertsConfig(
        num_experts=6, num_experts_per_token=2, balance_loss=0.01, router_z_loss=0.001, capacity_factor=None
    ),
)
