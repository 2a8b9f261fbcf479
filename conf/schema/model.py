"""The shape of a model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from conf.schema.types import NonNegativeFloat, PositiveFloat, PositiveInt, Strict


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsConfig(Strict):
    """Every feed-forward layer as a mixture of experts: a router sends each token to those it scores highest."""

    num_experts: PositiveInt
    """Feed-forward networks of a layer, each of width `ModelConfig.ffn_hidden_size`."""
    num_experts_per_token: PositiveInt
    """Experts a token goes through; what they return is weighed by the softmax over their scores."""
    balance_loss: NonNegativeFloat
    """Weight, in every layer, of the load-balancing loss, which is 1 when experts are used evenly; 0 is off."""
    router_z_loss: NonNegativeFloat
    """Weight, in every layer, of the router's squared log-partition; 0 is off."""
    capacity_factor: PositiveFloat | None
    """Tokens of a micro-batch that an expert takes in training, over its even share; null: all that are sent to it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(Strict):
    """A Llama-shaped decoder: RMSNorm, SwiGLU, rotary positions, grouped-query attention, no biases, no dropout.

    With `experts` it is Mixtral-shaped.
    """

    name: str
    num_layers: PositiveInt
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    """Width of each of the gate and up projections, of one expert where there are experts."""
    num_attention_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    vocab_size: PositiveInt
    max_sequence_length: PositiveInt
    rope_theta: PositiveFloat
    norm_epsilon: PositiveFloat
    init_std: PositiveFloat
    """Standard deviation of initial weights; projections back into the residual stream get 1/sqrt(2 layers) of it."""
    tied_embeddings: bool
    experts: ExpertsConfig | None = None
    """Null: dense."""

    @property
    def num_experts(self) -> int:
        """Feed-forward networks of a layer: 1 in a dense model."""
        return self.experts.num_experts if self.experts else 1

    def with_experts(self, num_experts: int) -> ModelConfig:
        """The same with so many experts a layer; a dense model stays as it is."""
        return replace(self, experts=replace(self.experts, num_experts=num_experts)) if self.experts else self

    @property
    def num_matmul_parameters(self) -> int:
        """Weights a token is multiplied by: all matrices but other experts', the head included, the lookup not."""
        per_token = self.experts.num_experts_per_token if self.experts else 1
        return self._num_matrix_parameters(per_token)

    @property
    def num_parameters(self) -> int:
        """All weights; tied embeddings count once."""
        return self._num_matrix_parameters(self.num_experts) + self._num_other_parameters

    @property
    def num_active_parameters(self) -> int:
        """Weights a token goes through: all but those of the experts it is not sent to."""
        return self.num_matmul_parameters + self._num_other_parameters

    @property
    def num_expert_parameters(self) -> int:
        """Weights of all experts of all layers, without the routers; 0 for a dense model."""
        num_experts = self.experts.num_experts if self.experts else 0
        return self.num_layers * num_experts * self._num_feed_forward_parameters

    def _num_matrix_parameters(self, num_experts: int) -> int:
        attention = 2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_kv_heads)
        router = self.hidden_size * self.experts.num_experts if self.experts else 0
        layer = attention + router + num_experts * self._num_feed_forward_parameters
        return self.num_layers * layer + self.vocab_size * self.hidden_size

    @property
    def _num_feed_forward_parameters(self) -> int:
        return 3 * self.hidden_size * self.ffn_hidden_size

    @property
    def _num_other_parameters(self) -> int:
        embedding = 0 if self.tied_embeddings else self.vocab_size * self.hidden_size
        return (2 * self.num_layers + 1) * self.hidden_size + embedding

    def train_flops_per_token(self, sequence_length: float) -> float:
        """Model FLOPs of one training step for one token, the numerator of model TFLOP/s and MFU.

        Forward and backward are 6 FLOPs a matmul weight (of the experts the token goes to), plus the attention scores
        and their use: 12 x layers x heads x head_dim x sequence_length over the whole square, counted half because
        attention is causal. Where rows keep documents apart, the mean length of the document a token is in stands for
        sequence_length. Recomputation, norms, softmax and the optimizer are not counted.
        """
        attention = 6 * self.num_layers * self.num_attention_heads * self.head_dim * sequence_length
        return float(6 * self.num_matmul_parameters + attention)
