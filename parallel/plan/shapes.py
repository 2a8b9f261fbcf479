"""What a model is to the cost model: the sizes of its layers, and the public models by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conf.schema import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A decoder-only transformer."""

    layers: int
    hidden: int
    ffn: int
    """Width of the feed-forward layer; of each of gate and up where it is gated."""
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    gated: bool
    tied: bool = False
    dropout: bool = False
    experts: int = 1
    experts_per_token: int = 1
    learned_positions: int = 0

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of the keys of all heads together; values are as wide."""
        return self.kv_heads * self.head_dim

    @property
    def attention_weights(self) -> int:
        """Matrix weights of one attention block."""
        return 2 * self.hidden * (self.query_width + self.kv_width)

    @property
    def expert_weights(self) -> int:
        """Matrix weights of one feed-forward layer (one expert of it)."""
        return (3 if self.gated else 2) * self.hidden * self.ffn

    @property
    def layer_weights(self) -> int:
        """Weights of one layer, norms included, all experts."""
        router = self.hidden * self.experts if self.experts > 1 else 0
        return self.attention_weights + self.experts * self.expert_weights + router + 2 * self.hidden

    @property
    def embedding_weights(self) -> int:
        """Weights of the embedding (and as many of the output head)."""
        return self.vocab * self.hidden

    @property
    def num_parameters(self) -> int:
        """All weights; tied embeddings once."""
        embeddings = self.embedding_weights * (1 if self.tied else 2) + self.learned_positions * self.hidden
        return self.layers * self.layer_weights + embeddings + self.hidden

    def train_flops_per_token(self, sequence: int) -> float:
        """Model FLOPs of a training step for one token, causal attention counted half, recomputation not counted.

        The convention of `ModelConfig.train_flops_per_token`.
        """
        router = self.hidden * self.experts if self.experts > 1 else 0
        active = self.attention_weights + router + self.experts_per_token * self.expert_weights
        attention = 6 * self.layers * self.query_width * sequence
        return float(6 * (self.layers * active + self.embedding_weights) + attention)


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """A model that another learns from: on the same ranks, forward passes only, weights and no gradients."""

    shape: Shape
    top_k: int
    """Logits kept of it a token; 0: all."""
    hidden_layers: int = 0
    """Layers whose outputs are learned from."""


def shape_of(model: ModelConfig) -> Shape:
    """The shape of a configured model."""
    return Shape(
        layers=model.num_layers,
        hidden=model.hidden_size,
        ffn=model.ffn_hidden_size,
        heads=model.num_attention_heads,
        kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        vocab=model.vocab_size,
        gated=True,
        tied=model.tied_embeddings,
        experts=model.experts.num_experts if model.experts else 1,
        experts_per_token=model.experts.num_experts_per_token if model.experts else 1,
    )


@dataclass(frozen=True, slots=True)
class PublicModel:
    """Sizes of a model's public configuration; the name is matched without case, spaces and dashes."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    gated: bool = True
    tied: bool = False
    experts: int = 1
    experts_per_token: int = 1
    head_dim: int = 0
    """0: hidden / heads."""

    def shape(self) -> Shape:
        """The same as a shape."""
        return Shape(
            layers=self.layers,
            hidden=self.hidden,
            ffn=self.ffn,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim or self.hidden // self.heads,
            vocab=self.vocab,
            gated=self.gated,
            tied=self.tied,
            experts=self.experts,
            experts_per_token=self.experts_per_token,
        )


# Longer names first where one begins with another.
PUBLIC_MODELS = {
    "llama27b": PublicModel(32, 4096, 11008, 32, 32, 32000),
    "llama213b": PublicModel(40, 5120, 13824, 40, 40, 32000),
    "llama270b": PublicModel(80, 8192, 28672, 64, 8, 32000),
    "llama321b": PublicModel(16, 2048, 8192, 32, 8, 128256, tied=True),
    "llama323b": PublicModel(28, 3072, 8192, 24, 8, 128256, tied=True),
    "llama38b": PublicModel(32, 4096, 14336, 32, 8, 128256),
    "llama370b": PublicModel(80, 8192, 28672, 64, 8, 128256),
    "llama318b": PublicModel(32, 4096, 14336, 32, 8, 128256),
    "llama3170b": PublicModel(80, 8192, 28672, 64, 8, 128256),
    "llama31405b": PublicModel(126, 16384, 53248, 128, 8, 128256),
    "llama3405b": PublicModel(126, 16384, 53248, 128, 8, 128256),
    "mixtral8x7b": PublicModel(32, 4096, 14336, 32, 8, 32000, experts=8, experts_per_token=2),
    "mixtral8x22b": PublicModel(56, 6144, 16384, 48, 8, 32768, experts=8, experts_per_token=2),
    "mistral7b": PublicModel(32, 4096, 14336, 32, 8, 32000),
    "mistralnemo12b": PublicModel(40, 5120, 14336, 32, 8, 131072, head_dim=128),
    "qwen27b": PublicModel(28, 3584, 18944, 28, 4, 152064),
    "qwen257b": PublicModel(28, 3584, 18944, 28, 4, 152064),
    "qwen2514b": PublicModel(48, 5120, 13824, 40, 8, 152064),
    "qwen2532b": PublicModel(64, 5120, 27648, 40, 8, 152064),
    "qwen2572b": PublicModel(80, 8192, 29568, 64, 8, 152064),
    "qwen38b": PublicModel(36, 4096, 12288, 32, 8, 151936, head_dim=128),
    "qwen314b": PublicModel(40, 5120, 17408, 40, 8, 151936, head_dim=128),
    "qwen332b": PublicModel(64, 5120, 25600, 64, 8, 151936, head_dim=128),
    "qwen330ba3b": PublicModel(48, 2048, 768, 32, 4, 151936, experts=128, experts_per_token=8, head_dim=128),
    "qwen3235ba22b": PublicModel(94, 4096, 1536, 64, 4, 151936, experts=128, experts_per_token=8, head_dim=128),
    "grok1": PublicModel(64, 6144, 32768, 48, 8, 131072, experts=8, experts_per_token=2),
    "gemma7b": PublicModel(28, 3072, 24576, 16, 16, 256000, tied=True, head_dim=256),
    "nemotron38b": PublicModel(32, 4096, 16384, 32, 32, 256000, gated=False),
    "nemotron322b": PublicModel(40, 6144, 24576, 48, 48, 256000, gated=False),
    "nemotron48b": PublicModel(32, 4096, 16384, 32, 32, 256000, gated=False),
    "nemotron415b": PublicModel(32, 6144, 24576, 48, 8, 256000, gated=False),
    "nemotron422b": PublicModel(40, 6144, 24576, 48, 48, 256000, gated=False),
    "nemotron4340b": PublicModel(96, 18432, 73728, 96, 8, 256000, gated=False),
    "gpt3175b": PublicModel(96, 12288, 49152, 96, 96, 51200, gated=False),
    "gpt320b": PublicModel(44, 6144, 24576, 48, 48, 51200, gated=False),
    "gpt35b": PublicModel(24, 4096, 16384, 32, 32, 51200, gated=False),
    "mpt760m": PublicModel(24, 1536, 6144, 12, 12, 50368, gated=False, tied=True),
    "mpt1b": PublicModel(24, 2048, 8192, 16, 16, 50368, gated=False, tied=True),
    "mpt3b": PublicModel(32, 2560, 10240, 20, 20, 50368, gated=False, tied=True),
    "mpt7b": PublicModel(32, 4096, 16384, 32, 32, 50368, gated=False, tied=True),
    "mpt13b": PublicModel(40, 5120, 20480, 40, 40, 50368, gated=False, tied=True),
    "mpt30b": PublicModel(48, 7168, 28672, 56, 56, 50368, gated=False, tied=True),
    "mpt70b": PublicModel(80, 8192, 32768, 64, 64, 50368, gated=False, tied=True),
}


def public_model(name: str) -> PublicModel | None:
    """The public model of this name, if it is known: the longest entry that the name contains."""
    plain = "".join(letter for letter in name.lower() if letter.isalnum())
    found = [key for key in PUBLIC_MODELS if key in plain]
    return PUBLIC_MODELS[max(found, key=len)] if found else None
