"""What a stage that takes optimizer steps is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from conf.schema.types import Decay, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Strict


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig(Strict):
    """AdamW and its learning-rate schedule."""

    learning_rate: PositiveFloat
    """Peak of the schedule."""
    final_learning_rate_ratio: Fraction
    """Last learning rate over the peak."""
    schedule: Literal["cosine", "wsd"]
    """After linear warm-up: cosine decay, or stable until the last `decay_fraction` of steps and then linear decay."""
    warmup_fraction: Fraction
    """Of the stage's steps."""
    decay_fraction: Fraction
    """Of the stage's steps; only for wsd."""
    beta1: Decay
    beta2: Decay
    epsilon: PositiveFloat
    weight_decay: NonNegativeFloat
    clip_grad_norm: NonNegativeFloat
    """Largest global gradient norm; 0 switches clipping off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureChange(Strict):
    """Another mixture from a point of a stage on."""

    from_fraction: Annotated[float, Field(gt=0, lt=1)]
    """Of the stage's steps."""
    mixture: dict[str, PositiveFloat]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig(Strict):
    """A stage that takes optimizer steps."""

    tokens: PositiveInt
    """Tokens to train on; rounded up to whole steps."""
    global_batch: PositiveInt
    """Sequences an optimizer step, over all data ranks."""
    micro_batch: PositiveInt
    """Sequences a data rank puts through the model at once."""
    sequence_length: PositiveInt
    mixture: dict[str, PositiveFloat]
    """Data source -> weight; weights need not add up to 1."""
    mixture_changes: tuple[MixtureChange, ...] = ()
    """Mixtures that follow the first one."""
    optim: OptimConfig
    z_loss: NonNegativeFloat
    """Weight of the squared log-partition term; 0 is off."""
    validate_every_steps: NonNegativeInt
    """0: only after the last step."""
    validation_tokens: PositiveInt
    """Held-out tokens a source, the same at every validation."""
    checkpoint_every_steps: NonNegativeInt
    """0: only after the last step and when stopped."""
    keep_checkpoints: PositiveInt
    """Newest ones kept; the last verified one is never deleted."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Sources of all its mixtures."""
        return tuple(dict.fromkeys([*self.mixture, *(name for each in self.mixture_changes for name in each.mixture)]))

    @property
    def tokens_per_step(self) -> int:
        """Tokens an optimizer step."""
        return self.global_batch * self.sequence_length

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the stage."""
        return -(-self.tokens // self.tokens_per_step)
