"""What a run is: the frozen dataclasses that every composed configuration must fit.

Pure data, no imports of anything heavy: a login node, a worker and a test read the same types. Sizes are given in the
field's standard terms; a suffix names the unit where there is one (`_tokens`, `_steps`, `_bytes`). Cross-field rules
live in `recipes/check.py`, not here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]

Scale = Literal["rehearsal", "full"]
Action = Literal["run", "check", "plan", "dry_run"]
Launcher = Literal["gang", "ray_train"]
Precision = Literal["fp32", "bf16"]


class Strict:
    """Unknown keys are faults, not noise."""

    __slots__ = ()
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


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
    def num_matmul_parameters(self) -> int:
        """Weights a token is multiplied by: all matrices but other experts', the head included, the lookup not."""
        per_token = self.experts.num_experts_per_token if self.experts else 1
        return self._num_matrix_parameters(per_token)

    @property
    def num_parameters(self) -> int:
        """All weights; tied embeddings count once."""
        return self._num_matrix_parameters(self.experts.num_experts if self.experts else 1) + self._num_other_parameters

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

    def train_flops_per_token(self, sequence_length: int) -> float:
        """Model FLOPs of one training step for one token, the numerator of model TFLOP/s and MFU.

        Forward and backward are 6 FLOPs a matmul weight (of the experts the token goes to), plus the attention scores
        and their use: 12 x layers x heads x head_dim x sequence_length over the whole square, counted half because
        attention is causal. Recomputation, norms, softmax and the optimizer are not counted.
        """
        attention = 6 * self.num_layers * self.num_attention_heads * self.head_dim * sequence_length
        return float(6 * self.num_matmul_parameters + attention)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshConfig(Strict):
    """Sizes of the parallel axes; the product of all but `expert` is the number of ranks."""

    tensor: PositiveInt
    context: PositiveInt
    pipeline: PositiveInt
    virtual_pipeline: PositiveInt
    """Layer chunks a pipeline rank holds; above 1 the schedule is interleaved."""
    data: PositiveInt | None
    """Null: as many as the cluster has ranks for and the batch can be shared by."""
    expert: PositiveInt = 1
    """Ranks that share the experts of a layer; each such group is a part of the data x context ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig(Strict):
    """How one model is spread over ranks and takes a step."""

    backend: Literal["megatron", "deepspeed"]
    mesh: MeshConfig
    precision: Literal["fp32", "bf16", "fp8", "fp8_rowwise"]
    """fp8: weights and optimizer as in bf16, matrix products of the layers in fp8 with one scale a tensor; fp8_rowwise:
    with one a row, slower and nearer to bf16."""
    sequence_parallel: bool
    """Split norms and residuals over the tensor axis along the sequence; needs tensor > 1."""
    zero_stage: Literal[0, 1, 2, 3]
    """Split over the data (and context) ranks: 1 optimizer state, 2 gradients as well, 3 weights as well."""
    offload_optimizer: Literal["none", "cpu"]
    """Where optimizer state lives and Adam runs: with the weights, or in host memory."""
    overlap: bool
    """Overlap gradient reduction (and gathering of split weights) with computation."""
    recompute: Literal["none", "selective", "full"]
    compile: bool = False
    """Compile each layer into few kernels; takes a minute at the start."""

    @property
    def weight_precision(self) -> Precision:
        """What weights and activations are kept in."""
        return "fp32" if self.precision == "fp32" else "bf16"


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
class SearchConfig(Strict):
    """Which smaller shapes are tried, and how long."""

    cut: Literal["width", "depth", "mixed"]
    """width: hidden channels, feed-forward neurons and key-value groups. depth: layers. mixed: all of them."""
    measure: Literal["parameters", "memory", "latency"]
    """What is cut: parameters, bytes of weights and of one row's keys and values, or measured seconds a token."""
    removed: Annotated[float, Field(gt=0, lt=1)]
    """Share of it that goes."""
    hidden_multiple: PositiveInt
    ffn_multiple: PositiveInt
    candidates: PositiveInt
    """Shapes scored, those that keep most of the importance first."""
    seconds: PositiveFloat
    """No further shape is begun after so long."""
    tokens: PositiveInt
    """Text each shape is scored on, apart from the calibration text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneStage(Strict):
    """Cut a smaller dense model out of a larger one."""

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
    """Logits kept of the teacher a token; 0: all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoverStage(Strict):
    """Distil the incoming (pruned) model from an earlier one."""

    kind: Literal["recover"]
    training: TrainingConfig
    distillation: DistillationConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig(Strict):
    """A student's shape and where its weights come from."""

    ratio: Annotated[float, Field(gt=1, allow_inf_nan=False)]
    """Parameters of the teacher over the student's, where `shape` is null."""
    shape: ShapeConfig | None
    start: Literal["fresh", "pruned"]
    """pruned: cut out of the teacher, by activations on `calibration`."""
    hidden_multiple: PositiveInt
    ffn_multiple: PositiveInt
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
    """Round an earlier model to INT8; the recipe goes on with the model it had."""

    kind: Literal["quantise"]
    model: str
    """Earlier stage, or `init`."""
    scheme: Literal["w8a16", "w8a8"]
    """w8a16: weights. w8a8: weights, and the inputs of linear layers as they come."""
    most_cost: NonNegativeFloat | None
    """A layer that alone raises the loss by more nats a token stays as it was; null: all are rounded."""
    calibration: CalibrationConfig
    """Text that cost is measured on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetConfig(Strict):
    """A promise about one model next to another."""

    model: str
    baseline: str
    source: str
    quantity: Literal["accuracy", "size"]
    """Ratio of next-token accuracy, on `source`, or of parameters."""
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


TrainingStage = PretrainStage | SpecialiseStage | RecoverStage | DistillStage | ControlStage
StageConfig = Annotated[
    TrainingStage | PruneStage | QuantiseStage | EvaluateStage | ExportStage, Field(discriminator="kind")
]


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig(Strict):
    """One corpus."""

    path: str
    """Text, jsonl or parquet file(s) or a prepared dataset; `shipped:NAME` for a corpus that comes with the project."""
    max_epochs: PositiveFloat | None = None
    """Passes over it that a stage may make; null: any number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageConfig(Strict):
    """How object storage is spoken to. Credentials are never here: they come from the provider's own chain."""

    endpoint: str | None = None
    """Null: the provider's, or AWS_ENDPOINT_URL. `http://` switches TLS off."""
    region: str | None = None
    """Null: AWS_REGION or the profile's."""
    request_seconds: PositiveFloat = 20.0
    """Longest a single request may take."""
    retry_seconds: PositiveFloat = 120.0
    """Failed requests are tried again for this long."""
    encryption: Literal["bucket_default", "sse_s3", "sse_kms"] = "bucket_default"
    """Of objects that are written."""
    kms_key_id: str | None = None
    """For sse_kms; null: the account's default key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryTierConfig(Strict):
    """Host memory of each rank, for blocks as they are stored."""

    kind: Literal["memory"]
    num_bytes: PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskTierConfig(Strict):
    """A folder on a disk of each node, shared by its ranks."""

    kind: Literal["disk"]
    path: str
    num_bytes: PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class RedisTierConfig(Strict):
    """A Redis server or cluster; user and password come from REDIS_USERNAME and REDIS_PASSWORD."""

    kind: Literal["redis"]
    url: str
    """redis:// or rediss:// with host and port, without a password."""
    num_bytes: PositiveInt
    """What it holds; must not be above the server's (or all the cluster's) maxmemory."""
    cluster: bool = False
    ttl_seconds: PositiveInt = 7 * 86400
    request_seconds: PositiveFloat = 2.0


TierConfig = Annotated[MemoryTierConfig | DiskTierConfig | RedisTierConfig, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShuffleConfig(Strict):
    """How far samples are mixed, for sources that do not fit the window; smaller ones are shuffled as a whole."""

    lanes: PositiveInt = 16
    """Contiguous shares of the global batch that read for themselves; up to as many data ranks read nothing twice.
    The largest divisor of the global batch up to this is used."""
    window_blocks: PositiveInt = 32
    """Blocks a lane mixes at a time. The more, the nearer to uniform (32: 0.97) and the more memory."""
    readahead_blocks: PositiveInt = 16
    """Blocks a rank asks for before they are needed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(Strict):
    """Where text comes from and how it becomes tokens."""

    tokenizer: str
    """Path of a `tokenizer.json`, or `shipped:NAME`."""
    sources: dict[str, SourceConfig]
    held_out_fraction: Annotated[float, Field(gt=0, lt=0.5)]
    """Share of documents, chosen by hash, that is never trained on."""
    cache_dir: str
    """Prepared datasets are kept here, each under its identity."""
    tiers: tuple[TierConfig, ...] = ()
    """Caches between ranks and storage, fastest first."""
    shuffle: ShuffleConfig = field(default_factory=ShuffleConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class HardwareConfig(Strict):
    """What a cluster is made of and costs; facts of the GPU itself are in `parallel/plan/hardware.py`."""

    gpu: str
    gpus_per_node: PositiveInt
    node_link_gb_per_s: PositiveFloat
    """Of a GPU to the others of its node, one direction: NVLink, or PCIe."""
    network_gb_per_s: PositiveFloat
    """Of a GPU to other nodes, one direction: its share of the node's network cards."""
    storage_gb_per_s: PositiveFloat
    """That a node writes to the shared disk."""
    node_watts: NonNegativeFloat
    """Of a node without its GPUs, under load: processors, memory, fans, network cards, its share of the switches."""
    pue: Annotated[float, Field(ge=1, le=3)]
    """Power of the whole building over that of the machines."""
    dollars_per_gpu_hour: NonNegativeFloat
    gpu_days_per_failure: PositiveFloat
    """GPUs times days between two interruptions that nobody planned."""
    restart_minutes: NonNegativeFloat
    """From an interruption to the next step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ContainerConfig(Strict):
    """The image everything of a job runs in, on every node."""

    runtime: Literal["none", "pyxis", "apptainer"]
    image: str | None
    mounts: tuple[str, ...]
    """`HOST:CONTAINER`, besides the run's own directories, which are mounted where they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreflightConfig(Strict):
    """What a node must show before it is given ranks; thresholds of 0 switch a measurement off."""

    intra_node_gb_per_second: NonNegativeFloat
    """Least bus bandwidth of an all-reduce over the ranks of one node."""
    node_pair_gb_per_second: NonNegativeFloat
    """Least bus bandwidth of an all-reduce over the ranks of two nodes."""
    infiniband_ports: NonNegativeInt
    """Active ports a node must have."""
    infiniband_gbit_per_second: NonNegativeFloat
    """Least rate of each of them, e.g. 400 for NDR."""
    local_disk_gib: NonNegativeFloat
    """Least free space on the node's own temporary disk."""
    clock_seconds: PositiveFloat
    """Largest difference of a node's clock to the first node's."""
    timeout_seconds: PositiveFloat
    """A node that has not reported by then has failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmConfig(Strict):
    """What is asked of Slurm, and what surrounds a run on its nodes. Null leaves the cluster's own default."""

    account: str | None
    partition: str | None
    qos: str | None
    reservation: str | None
    time_limit_minutes: PositiveInt | None
    signal_seconds: PositiveInt
    """The run is asked to save and stop this long before its time limit; it is then queued again."""
    spare_nodes: NonNegativeInt
    """Further nodes in the allocation, to replace those that fail."""
    exclusive: bool
    cpus_per_node: PositiveInt | None
    """Null with `exclusive`: all of them."""
    max_requeues: NonNegativeInt
    max_array_jobs: NonNegativeInt
    """Of a sweep, at most this many run at a time; 0: no limit."""
    modules: tuple[str, ...]
    """Environment modules to load."""
    variables: dict[str, str]
    """Environment variables of every process of the run."""
    python: str | None
    """Null: the interpreter that submits, or `python` of the container."""
    before: tuple[str, ...]
    """Shell lines of your own, run on the first node before anything of the run."""
    after: tuple[str, ...]
    """The same, when the job ends for whatever reason it has time to tell."""
    sbatch: tuple[str, ...]
    """Further options of sbatch, e.g. `--constraint=ib`."""
    container: ContainerConfig
    preflight: PreflightConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig(Strict):
    """Where ranks run."""

    name: str
    kind: Literal["local", "ray", "slurm"]
    """local: a private Ray on this machine. ray: join the Ray cluster at `address`. slurm: queue a job."""
    address: str | None
    device: Literal["auto", "cpu", "cuda"]
    num_nodes: PositiveInt
    ranks_per_node: PositiveInt | None
    """Null: what this machine has (GPUs, else cores)."""
    node_labels: dict[str, str]
    """Ray node labels every node of the gang must carry, e.g. its InfiniBand domain."""
    slurm: SlurmConfig | None = None
    """Where kind is slurm."""
    hardware: HardwareConfig | None = None
    """Null: not known, as on this machine; there is no plan then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig(Strict):
    """Weights & Biases; metrics.jsonl is the record and is always written."""

    mode: Literal["auto", "online", "offline", "disabled"]
    """auto: online when a key is set, else offline."""
    project: str
    entity: str | None
    tags: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget(Strict):
    """What the full-size run may take."""

    gpu: str
    gpus: PositiveInt
    days: PositiveFloat
    power_mw: PositiveFloat


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig(Strict):
    """Everything a run is. `config.json` of a run directory holds exactly this."""

    name: str
    """The recipe."""
    description: str
    scale: Scale
    action: Action
    launcher: Launcher
    seed: NonNegativeInt
    controls: bool
    """Run the stages that exist to be compared with as well."""
    runs_dir: str
    init: str | None
    """Where weights come from: null (fresh), `recipe:NAME` (newest finished run of it), or a checkpoint directory."""
    resume: str | None
    """`latest` (newest unfinished run of this recipe), a run directory, or null for a new run."""
    order: tuple[str, ...]
    stages: dict[str, StageConfig]
    model: ModelConfig
    engine: EngineConfig
    data: DataConfig
    cluster: ClusterConfig
    tracking: TrackingConfig
    budget: Budget
    overrides: tuple[str, ...] = ()
    """What was typed, in Hydra's terms; composing them again gives this configuration."""
    full_size: RunConfig | None = field(default=None)
    """The same recipe at full size, where this is a rehearsal of it."""
