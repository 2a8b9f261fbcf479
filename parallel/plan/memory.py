"""GPU memory of every pipeline stage, part by part.

Counted, not fitted: what autograd keeps for the backward pass of a layer follows from its formulas (Korthikanti et al.,
2022, generalised to grouped queries, gated feed-forward layers and context parallelism), and weights, gradients and
optimizer state from the sharding. What cannot be counted is the allocator's slack.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel.plan.layout import Layout
from parallel.plan.shapes import Shape, Teacher

GIB = 2**30
WORKSPACE_BYTES = 0.1 * GIB
"""cuBLAS and TransformerEngine workspaces, random states: what a process holds before any tensor of ours."""
RESERVED_SLACK = 0.03
"""Of the peak: blocks the caching allocator holds and cannot use. Counts in reserved memory, not in allocated."""
OUTSIDE_BYTES = 2.5 * GIB
"""CUDA context, NCCL buffers and kernels, which no allocator statistic shows and the GPU must hold too."""
DEEPSPEED_LIVE_PARAMETERS = 1e9
"""ZeRO-3 `stage3_max_live_parameters`: gathered and not yet released."""
DEEPSPEED_BUCKET = 5e8
"""Elements of the reduce bucket; held as bf16, as its copy in flight and as its fp32 form."""
SLICE_LOGITS = 2**26
"""Logits that a loss which works in slices looks at at once: `LOGIT_BYTES` of `parallel/loss.py` in fp32."""
CAST_SLICE_BYTES = 8
"""Bytes each of them takes besides itself and its gradient where those are not fp32: both in fp32, on a CPU, kernel by
kernel. Fused on a GPU it is less. What is computed in fp32 anyway takes nothing more: it ends where it begins."""
DISTILLED_BYTES = 12
"""Bytes in fp32 that a logit learned from a teacher's takes besides the two: log-probabilities of both and one's
probability (or, later, a gradient and what the cross-entropy needs). Of a slice, where the head is sliced."""
LAYERS_ON_DEVICE = 2
"""Layers whose activations stay where they are offloaded: one computes, and one is copied."""
OFFLOADED_STATE_BYTES = 12.0
"""A parameter: its master and two moments in fp32."""
TOP_K_BYTES = 10
"""That a kept logit of a teacher takes: bf16, and its id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMemory:
    """Bytes on one GPU of a pipeline stage."""

    stage: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    """With a teacher, what is kept of its logits for all micro-batches of a step as well."""
    buffers: float
    teacher: float = 0.0
    """Its weights, and its hidden states that are learned from."""
    host_activations: float = 0.0
    """In host memory, beside all of the above."""
    host_optimizer: float = 0.0
    """In host memory as well, where optimizer state is offloaded: its gradients and what is copied to the GPU too."""
    disk_optimizer: float = 0.0
    """On a local disk."""

    @property
    def allocated(self) -> float:
        """Between steps: what stays when no micro-batch is in flight."""
        return self.weights + self.gradients + self.optimizer + self.teacher + WORKSPACE_BYTES

    @property
    def host(self) -> float:
        """Host memory."""
        return self.host_activations + self.host_optimizer

    @property
    def peak(self) -> float:
        """Most that tensors take at once in a step."""
        return self.allocated + self.activations + self.logits + self.buffers

    @property
    def reserved(self) -> float:
        """Peak that the caching allocator holds."""
        return self.peak * (1 + RESERVED_SLACK)

    @property
    def needed(self) -> float:
        """What the GPU must have."""
        return self.reserved + OUTSIDE_BYTES

    @property
    def parts(self) -> dict[str, float]:
        """What `needed` is made of, by name; a teacher only where there is one."""
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "logits": self.logits,
            "working buffers": self.buffers + WORKSPACE_BYTES,
            "allocator slack": self.reserved - self.peak,
            "CUDA and NCCL": OUTSIDE_BYTES,
            **({"teacher": self.teacher} if self.teacher else {}),
        }


def memory(shape: Shape, layout: Layout, teacher: Teacher | None = None) -> tuple[StageMemory, ...]:
    """Memory of each pipeline stage, first to last."""
    return tuple(stage_memory(shape, layout, stage, teacher) for stage in range(layout.pipeline))


def stage_memory(shape: Shape, layout: Layout, stage: int, teacher: Teacher | None = None) -> StageMemory:
    """Memory of one GPU of a pipeline stage.

    A teacher's own pass needs less than the student's, and comes before it: of a teacher, weights and logits count.
    """
    is_last = stage == layout.pipeline - 1
    weights, gradients, optimizer = _states(shape, layout, stage)
    kept = kept_bytes(shape, layout, stage)
    logits = _logit_bytes(shape, layout, teacher) if is_last and not layout.chunked_loss else 0.0
    # The head is done with when the first layer is walked back. In our engine that is measured to the byte; softwares
    # that prefetch and compile across it were seen to hold both.
    walked_back = recomputed_bytes(shape, layout) + _backward_bytes(shape, layout)
    freed = logits + kept.head_norm if layout.stack.keeps_projection else 0.0
    return StageMemory(
        stage=stage,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=kept.layers + kept.head_norm,
        logits=logits + (_kept_logit_bytes(teacher, layout) if teacher is not None and is_last else 0.0),
        buffers=_buffers(shape, layout) + max(0.0, walked_back - freed),
        teacher=_states(teacher.shape, layout, stage)[0] + _kept_hidden_bytes(teacher, layout) if teacher else 0.0,
        host_activations=(layers_in_flight(shape, layout, stage) - layers_on_device(shape, layout, stage))
        * saved_bytes(shape, layout),
        host_optimizer=_sharded_parameters(shape, layout, stage) * _offloaded_bytes(layout)[0],
        disk_optimizer=_sharded_parameters(shape, layout, stage) * _offloaded_bytes(layout)[1],
    )


def serving_memory(teacher: Teacher, layout: Layout) -> StageMemory:
    """Memory of the fullest GPU of a teacher that has GPUs of its own: weights, and a forward pass that keeps nothing.

    Counted is one layer at work, as if it kept what a backward pass needs, and the head on its slices.
    """
    stages = [
        StageMemory(
            stage=stage,
            weights=_states(teacher.shape, layout, stage)[0],
            gradients=0.0,
            optimizer=0.0,
            activations=saved_bytes(teacher.shape, layout, recompute="none"),
            logits=(_logit_bytes(teacher.shape, layout, teacher) + _kept_logit_bytes(teacher, layout))
            * (stage == layout.pipeline - 1),
            buffers=0.0,
        )
        for stage in {0, layout.pipeline - 1}
    ]
    return max(stages, key=lambda stage: stage.needed)


def _logit_bytes(shape: Shape, layout: Layout, teacher: Teacher | None) -> float:
    """What head and loss of a micro-batch hold at once."""
    count, each = layout.tokens * shape.vocab / layout.tensor, layout.element_bytes
    if teacher is not None:
        at_once = min(count, SLICE_LOGITS) if layout.stack.slices == "head" else count
        return at_once * (DISTILLED_BYTES + (1 if teacher.top_k else 2) * each)
    match layout.stack.slices:
        case "nothing":
            return count * (12 if each == 4 else layout.stack.logit_bytes)
        case "loss":
            return count * 2 * each + min(count, SLICE_LOGITS) * _slice_bytes(layout)
        case "head":
            return min(count, SLICE_LOGITS) * (2 * each + _slice_bytes(layout))


def _slice_bytes(layout: Layout) -> float:
    """Bytes a logit of a slice, besides itself and its gradient."""
    return CAST_SLICE_BYTES if layout.element_bytes == 2 else 0


def _kept_logit_bytes(teacher: Teacher, layout: Layout) -> float:
    """What is kept of the teacher's predictions, of all micro-batches of a step: what goes into its head."""
    tokens = layout.micro_batches * layout.tokens
    if teacher.top_k:
        return tokens * teacher.top_k * TOP_K_BYTES
    return tokens * teacher.shape.hidden * layout.element_bytes


def _kept_hidden_bytes(teacher: Teacher, layout: Layout) -> float:
    """Outputs of the teacher's layers that are learned from, of all micro-batches of a step; evenly over the stages."""
    tokens = layout.micro_batches * layout.tokens / layout.sequence_split
    return tokens * teacher.shape.hidden * layout.element_bytes * -(-teacher.hidden_layers // layout.pipeline)


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes kept for the backward pass when most micro-batches are in flight."""

    layers: float
    head_norm: float
    """Input of the norm before the head, and of the head (or its gradient); 0 where there is no head, and in Megatron's
    own layers, where it is within the error."""


def kept_bytes(shape: Shape, layout: Layout, stage: int) -> Kept:
    """What autograd keeps on one GPU of a stage, logits apart."""
    layers = layers_on_device(shape, layout, stage) * saved_bytes(shape, layout)
    if layout.stack.keeps_projection:
        is_last = stage == layout.pipeline - 1
        norm = (1 + layout.stack.extra_saved / 4) / layout.sequence_split
        # Where the head is sliced, the gradient of its input waits for the backward pass: of all tokens.
        head = 1.0 if layout.stack.slices == "head" else 1 / layout.sequence_split
        return Kept(layers, is_last * layout.tokens * layout.element_bytes * shape.hidden * (norm + head))
    if stage == 0:
        in_flight = min(layout.micro_batches, layout.pipeline)
        layers += in_flight * layout.tokens * shape.hidden * (3 if shape.dropout else 2) / layout.sequence_split
    return Kept(layers, 0.0)


def layers_in_flight(shape: Shape, layout: Layout, stage: int) -> float:
    """Of how many layers, over all micro-batches, one GPU of a stage keeps activations at once."""
    return chunks_in_flight(layout, stage) * layers_of_stage(shape, layout, stage) / layout.virtual_pipeline


def layers_on_device(shape: Shape, layout: Layout, stage: int) -> float:
    """Of how many of them on the device itself."""
    in_flight = layers_in_flight(shape, layout, stage)
    if not layout.offload_activations:
        return in_flight
    # Where other micro-batches are under way, the last ones to go out are there when the first ones come back.
    return min(in_flight, LAYERS_ON_DEVICE * (1 if chunks_in_flight(layout, stage) == 1 else 2))


def recomputed_bytes(shape: Shape, layout: Layout) -> float:
    """What one layer's second forward pass keeps."""
    match layout.recompute:
        case "full":
            return saved_bytes(shape, layout, recompute="none")
        case "mlp":
            return layout.element_bytes / 2 * layout.tokens * _saved_feed_forward(shape, layout) / layout.tensor
        case _:
            return 0.0


def _backward_bytes(shape: Shape, layout: Layout) -> float:
    """Gradients on the way through one layer: of the feed-forward layer's inner widths, and of its weights."""
    if not layout.stack.keeps_projection:
        return 0.0
    widths = (3 if shape.gated else 2) * shape.ffn * shape.experts_per_token / layout.tensor
    widths += 2 * shape.hidden / layout.sequence_split
    weights = (2 if shape.gated else 1) * shape.ffn * shape.hidden / layout.tensor
    return layout.element_bytes * (layout.tokens * widths + weights)


def chunks_in_flight(layout: Layout, stage: int) -> int:
    """Layer chunks of which a stage keeps activations at once: 1F1B, or its interleaved form."""
    later = layout.pipeline - stage - 1
    if layout.virtual_pipeline == 1:
        return min(layout.micro_batches, later + 1)
    warm_up = 2 * later + (layout.virtual_pipeline - 1) * layout.pipeline
    return min(layout.micro_batches * layout.virtual_pipeline, warm_up + 1)


def layers_of_stage(shape: Shape, layout: Layout, stage: int) -> float:
    """Layers of a stage: an equal share; where that is not whole, embedding and head count as a layer each."""
    if shape.layers % layout.pipeline == 0:
        return shape.layers / layout.pipeline
    share = (shape.layers + 2) / layout.pipeline
    return share - (stage == 0) - (stage == layout.pipeline - 1)


def stage_parameters(shape: Shape, layout: Layout, stage: int) -> tuple[float, float]:
    """Parameters one GPU of a stage holds before data sharding: of experts, and all others."""
    layers = layers_of_stage(shape, layout, stage)
    experts = layers * shape.experts * shape.expert_weights if shape.experts > 1 else 0.0
    dense = layers * shape.layer_weights - experts
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    embeddings = int(is_first) + int(is_last)
    if shape.tied and layout.pipeline == 1:
        embeddings = 1
    dense += embeddings * shape.embedding_weights + (shape.learned_positions * shape.hidden if is_first else 0)
    return experts / (layout.tensor * layout.expert), dense / layout.tensor


def saved_bytes(shape: Shape, layout: Layout, recompute: str | None = None) -> float:
    """Bytes that one layer keeps of one micro-batch on one GPU for its backward pass."""
    recompute = recompute or layout.recompute
    stack, tensor, scale = layout.stack, layout.tensor, layout.element_bytes / 2
    hidden, queries, keys = shape.hidden, shape.query_width, shape.kv_width
    ffn = shape.ffn * shape.experts_per_token
    if recompute == "full":
        return scale * 2 * layout.tokens * hidden / layout.sequence_split
    if recompute == "selective" and stack.selective_is_by_operation:
        # The layer's input, attention's output, and every other matrix product.
        products = queries + 2 * keys + hidden + (2 if shape.gated else 1) * ffn + hidden
        return layout.tokens * ((2 + stack.extra_saved) * hidden + 2 * queries + products) / tensor
    product_input = 1 if layout.precision == "fp8" and stack.saves_fp8 else 2
    masks = 2 if shape.dropout else 0
    norms = (4 + 2 * product_input + masks + stack.extra_saved) * hidden
    feed_forward = 0.0 if recompute == "mlp" else _saved_feed_forward(shape, layout)
    scores = 0.0
    if layout.unfused_attention and recompute == "none":
        scores = 5.0 * shape.heads * layout.sequence
    split = norms / layout.sequence_split + (_saved_attention(shape, layout) + feed_forward + scores) / tensor
    whole = 8 * shape.head_dim if stack.keeps_projection else 0
    return scale * layout.tokens * (split + whole)


def _saved_attention(shape: Shape, layout: Layout) -> float:
    """Bytes a token that attention keeps in 16 bits, over all tensor ranks."""
    queries, keys = shape.query_width, shape.kv_width
    if not layout.stack.keeps_projection:
        return 2 * (2 * queries + 2 * keys)
    # Sums of exponents are in fp32. Chunks of a context rank's sequence are joined after attention: kept both ways.
    sums = 4 * shape.heads * 2 / layout.element_bytes
    if layout.context == 1:
        return 2 * (3 * queries + 3 * keys) + sums
    return 2 * (3 * queries + 2 * keys * layout.context) + sums


def _saved_feed_forward(shape: Shape, layout: Layout) -> float:
    """Bytes a token that the feed-forward layer keeps, its input apart, over all tensor ranks."""
    ffn = shape.ffn * shape.experts_per_token
    product_input = 1 if layout.precision == "fp8" and layout.stack.saves_fp8 else 2
    return ((4 if shape.gated else 2) + product_input + layout.stack.extra_saved_ffn) * ffn


def _sharded_parameters(shape: Shape, layout: Layout, stage: int) -> float:
    """Parameters of which one GPU holds the optimizer state, where that is split."""
    experts, dense = stage_parameters(shape, layout, stage)
    # Experts are shared by fewer ranks, so that there are fewer to split their optimizer state over.
    return experts / max(1, layout.shards // layout.expert) + dense / layout.shards


def _offloaded_bytes(layout: Layout) -> tuple[float, float]:
    """Bytes a parameter in host memory and on disk: masters, moments, gradients, and weights rounded for the GPU."""
    staged = 4.0 + layout.element_bytes
    match layout.offload:
        case "none":
            return 0.0, 0.0
        case "cpu":
            return OFFLOADED_STATE_BYTES + staged, 0.0
        case "nvme":
            return 4.0 + staged, OFFLOADED_STATE_BYTES  # DeepSpeed makes the masters in host memory, before they move


def _states(shape: Shape, layout: Layout, stage: int) -> tuple[float, float, float]:
    stack = layout.stack
    local, sharded = sum(stage_parameters(shape, layout, stage)), _sharded_parameters(shape, layout, stage)
    weight_bytes, gradient_bytes = (2.0, 4.0) if stack.state_bytes == 6 else (stack.state_bytes / 2,) * 2
    if layout.precision == "fp32":
        weight_bytes, gradient_bytes = 4.0, 4.0
    fp8_copies = 2.0 * local if layout.precision == "fp8" and stack.saves_fp8 else 0.0
    # In fp32 the weights are their own masters.
    optimizer = 0.0 if layout.offload != "none" else 8.0 if layout.precision == "fp32" else stack.optimizer_bytes
    match layout.sharding:
        case "none":
            return weight_bytes * local + fp8_copies, gradient_bytes * local, optimizer * local
        case "zero1":
            return weight_bytes * local + fp8_copies, gradient_bytes * local, optimizer * sharded
        case "zero2":
            return weight_bytes * local, gradient_bytes * sharded, optimizer * sharded
        case "zero3":
            return weight_bytes * sharded, gradient_bytes * sharded, optimizer * sharded


def _buffers(shape: Shape, layout: Layout) -> float:
    stack = layout.stack
    if stack.name == "deepspeed":
        bucket = DEEPSPEED_BUCKET * (2 + 2 + 4)
        if layout.sharding != "zero3":
            return bucket
        live = min(DEEPSPEED_LIVE_PARAMETERS, shape.num_parameters) * 2
        return bucket + live + 4.0 * 2 * shape.embedding_weights
    if layout.sharding == "zero3":
        # Two layers and the output head gathered in bf16, and their whole gradients before they are reduced.
        unit = (2 * shape.layer_weights + shape.embedding_weights) / layout.tensor
        return unit * (2 + stack.gradient_bytes)
    return 0.0
