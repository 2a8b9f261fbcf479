"""The stages a recipe is made of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field

from conf.schema.engine import MeshConfig
from conf.schema.model import ModelConfig
from conf.schema.training import TrainingConfig
from conf.schema.types import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Precision,
    Scheme,
    Strict,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainStage(Strict):
    """Train from fresh weights."""

    kind: Literal["pretrain"]
    training: TrainingConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecialiseStage(Strict):
    """Continue training the incoming model on a domain."""

    kind: Literal["specialise"]
    training: TrainingConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapeConfig(Strict):
    """The sizes in which a smaller model may differ from the one it comes from."""

    num_layers: PositiveInt
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_kv_heads: PositiveInt
    num_experts: PositiveInt | None = None
    """Of each layer; null: as many as the model has."""

    def applied_to(self, model: ModelConfig) -> ModelConfig:
        """The model in these sizes."""
        return replace(
            model,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_kv_heads=self.num_kv_heads,
        ).with_experts(self.num_experts or model.num_experts)


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationConfig(Strict):
    """Training text that a model is looked at with; documents a model is evaluated on are refused."""

    mixture: dict[str, PositiveFloat]
    """Data source -> weight."""
    tokens: PositiveInt
    """Rounded up to whole micro-batches of every data rank."""
    sequence_length: PositiveInt
    micro_batch: PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class GridConfig(Strict):
    """What the sizes of smaller shapes are multiples of.

    Those that the run's axes need besides are added, so the shape is another one only where they could not share it.
    """

    hidden_multiple: PositiveInt
    ffn_multiple: PositiveInt
    kv_heads_multiple: PositiveInt
    """Tensor ranks share key-value heads out."""
    layers_multiple: PositiveInt
    """Pipeline ranks (times virtual_pipeline) share layers out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig(GridConfig):
    """Which smaller shapes are tried, and how long."""

    cut: Literal["width", "depth", "mixed"]
    """width: hidden channels, feed-forward neurons, key-value groups and experts. depth: layers. mixed: all of them."""
    measure: Literal["parameters", "memory", "latency"]
    """What is cut: parameters, bytes of weights and of one row's keys and values, or measured seconds a token."""
    removed: Annotated[float, Field(gt=0, lt=1)]
    """Share of it that goes."""
    candidates: PositiveInt
    """Shapes scored, those that keep most of the importance first."""
    seconds: PositiveFloat
    """No further shape is begun after so long."""
    tokens: PositiveInt
    """Text each shape is scored on, apart from the calibration text."""
    experts_multiple: PositiveInt = 1
    """Numbers of experts are multiples of it: expert ranks share them out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneStage(Strict):
    """Cut a smaller model out of a larger one."""

    kind: Literal["prune"]
    model: str | None
    """Earlier stage (or `init`) whose model is cut; null: the incoming one."""
    importance: Literal["activation", "magnitude", "random"]
    calibration: CalibrationConfig
    search: SearchConfig
    shape: ShapeConfig | None
    """Given, nothing is searched."""
    shape_of: str | None
    """Earlier stage whose model has the shape; nothing is searched."""
    control: bool
    """Made to be compared with: the recipe goes on with the model it had."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenStatesConfig(Strict):
    """Learning from what comes out of a teacher's layers, beside its logits.

    Where widths differ, a projection is trained with the student and left out of its model.
    """

    layers: dict[int, int]
    """The student's layer -> the teacher's, counted from 0; both of a pair on the same pipeline rank."""
    distance: Literal["cosine", "mse"]
    """cosine: 1 - cosine. mse: squared difference over the square of the teacher's."""
    weight: PositiveFloat
    """Of the mean distance, in the loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceConfig(Strict):
    """A teacher on ranks of its own, beside the student's, which speaks of coming steps while the student takes one."""

    mesh: MeshConfig
    """Its axes; data null: 1. Its ranks are further ranks of the cluster, after the student's."""
    backend: Literal["megatron", "deepspeed"] | None = None
    """Null: the student's, and so with `precision`."""
    precision: Literal["fp32", "bf16", "fp8", "fp8_rowwise"] | None = None
    sequence_parallel: bool = False
    steps_ahead: PositiveInt = 2
    """Of the student; so many steps, and one, are held in host memory."""
    sent_as: Literal["bf16", "fp16", "fp32"] = "fp16"
    """Type of the logarithms of probabilities; in fp32 losses are those of a teacher in the same processes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationConfig(Strict):
    """How a model learns from another's logits."""

    teacher: str
    """Earlier stage, or `init`."""
    divergence: Literal["forward", "reverse"]
    """forward: KL(teacher || student). reverse: KL(student || teacher)."""
    temperature: PositiveFloat
    weight: Fraction
    """Of the divergence; cross-entropy has the rest."""
    top_k: NonNegativeInt
    """Logits kept of the teacher a token, all other tokens being one outcome; 0: all."""
    logits: str | None = None
    """Where the teacher's likeliest tokens were written down: an earlier stage of kind logits, or the folder or URI of
    what one wrote in another run. Null: the teacher is asked."""
    service: ServiceConfig | None = None
    """Null: it is in the student's processes."""
    hidden_states: HiddenStatesConfig | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitsStage(Strict):
    """Write down what the teacher of a later stage says of its text; passes the incoming model on unchanged."""

    kind: Literal["logits"]
    stage: str
    """Later stage that learns from it: its teacher, text, temperature and top_k are taken."""
    stored_as: Literal["bf16", "fp16", "fp32"]
    location: str | None
    """Folder or URI to write to; null: in the run's directory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoverStage(Strict):
    """Distil the incoming (pruned) model from an earlier one."""

    kind: Literal["recover"]
    training: TrainingConfig
    distillation: DistillationConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig(GridConfig):
    """A student's shape and where its weights come from."""

    ratio: Annotated[float, Field(gt=1, allow_inf_nan=False)]
    """Parameters of the teacher over the student's, where `shape` is null."""
    shape: ShapeConfig | None
    start: Literal["fresh", "pruned"]
    """pruned: cut out of the teacher, by activations on `calibration`."""
    calibration: CalibrationConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillStage(Strict):
    """Distil a much smaller student from an earlier model."""

    kind: Literal["distill"]
    training: TrainingConfig
    distillation: DistillationConfig
    student: StudentConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlStage(Strict):
    """Train a model on cross-entropy to compare with; the recipe goes on with the model it had."""

    kind: Literal["control"]
    model: str
    """Earlier stage (or `init`) whose model it starts from."""
    fresh: bool
    """Of that model take the shape alone, with fresh weights."""
    training: TrainingConfig
    flops_of: str | None
    """Earlier distilling stage: train for its FLOPs, teacher included, rather than for `training.tokens`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantiseStage(Strict):
    """Round an earlier model to eight bits; the recipe goes on with the model it had."""

    kind: Literal["quantise"]
    model: str
    """Earlier stage, or `init`."""
    scheme: Scheme
    """w8a16: INT8 weights. w8a8: INT8 weights, and the inputs of linear layers as they come. fp8: both in E4M3."""
    smoothing: Fraction | None = None
    """How much of what outliers of inputs make difficult goes to the weights (SmoothQuant's alpha); null: none."""
    most_cost: NonNegativeFloat | None
    """A layer that alone raises the loss by more nats a token stays as it was; null: all are rounded."""
    calibration: CalibrationConfig
    """Text that inputs are observed on for `smoothing`, and as much other text that cost is measured on."""
    control: bool = False
    """Made to be compared with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetConfig(Strict):
    """A promise about one model next to another."""

    model: str
    baseline: str
    source: str
    quantity: Literal["accuracy", "size", "speed"]
    """Ratio of next-token accuracy, on `source`, of parameters, or of tokens a second written by the exported model."""
    at_least: NonNegativeFloat | None
    at_most: NonNegativeFloat | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateStage(Strict):
    """Score models side by side on held-out documents; passes the incoming model on unchanged."""

    kind: Literal["evaluate"]
    models: tuple[str, ...]
    """Names of earlier stages, or `init` for the model the recipe starts from."""
    sources: tuple[str, ...]
    tokens: PositiveInt
    """Held-out tokens a source, at most."""
    sequence_length: PositiveInt
    micro_batch: PositiveInt
    ngram_order: Literal[0, 2, 3]
    """Order of the n-gram baseline that has seen the same tokens; 0: none."""
    ngram_models: tuple[str, ...]
    """Models beside which it stands."""
    ngram_tokens: PositiveInt
    """Tokens the baseline is trained on, at most: the last ones the models saw."""
    comparisons: dict[str, tuple[str, ...]] | None
    """Model -> models it is compared with; null: every one with each that is named before it."""
    targets: dict[str, TargetConfig]
    """By name: what is promised, shown beside what was reached."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportStage(Strict):
    """Write models as Hugging Face directories."""

    kind: Literal["export"]
    models: tuple[str, ...]
    """Earlier stages, each written to `export/NAME`; none: the incoming model, to `export`."""
    precision: Precision
    speed_prompt_tokens: NonNegativeInt = 0
    """Tokens of the prompt after which exported models are timed, in transformers, all on one device; 0: none is."""


TrainingStage = PretrainStage | SpecialiseStage | RecoverStage | DistillStage | ControlStage
StageConfig = Annotated[
    TrainingStage | PruneStage | LogitsStage | QuantiseStage | EvaluateStage | ExportStage, Field(discriminator="kind")
]
