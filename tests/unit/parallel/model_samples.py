"""A small model with unequal sizes everywhere."""

from __future__ import annotations

from conf.schema import ModelConfig

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
