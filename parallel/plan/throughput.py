"""Time of a training step, part by part.

A micro-batch on the slowest pipeline stage is timed from its matrix products, attention, memory traffic and the links
between tensor, context and expert ranks; the step is that many times, the pipeline's bubble, what the exchange between
data ranks does not hide, and the optimizer. More of any resource never makes a step slower.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from parallel.plan.constants import FITTED, Constants
from parallel.plan.hardware import Gpu
from parallel.plan.layout import Layout
from parallel.plan.memory import OFFLOADED_STATE_BYTES, layers_of_stage, saved_bytes, stage_parameters
from parallel.plan.shapes import Shape, Teacher

OPTIMIZER_TRAFFIC = 34.0
"""Bytes read and written a parameter by the gradient norm and AdamW on fp32 state."""
SCORE_TRAFFIC = 12.0
"""Bytes read and written an attention score in a forward pass that writes them out."""
FLASH1_OVER_FLASH2 = 0.6
"""Speed of the first FlashAttention over the second, causal heads of 128 (Dao, 2023)."""
BUCKET_PARAMETERS = 250e6
"""Parameters a collective between data ranks carries. Latency was seen to grow in proportion to the ranks."""
HOST_BANDWIDTH = 40e9
"""Bytes/s of host memory that one GPU's share of the cores gets (8-12 DDR5 channels a socket, two sockets, 8 GPUs)."""
PCIE_BANDWIDTH = 50e9
"""Bytes/s between a GPU and the host (PCIe 5.0 x16)."""
NVME_READ_BANDWIDTH = 6.5e9
"""Bytes/s of one drive a GPU, as in the eight-GPU nodes of the vendor (PCIe 4.0 x4; Samsung's figures for a PM9A3)."""
NVME_WRITE_BANDWIDTH = 3.5e9
FP32_OVER_BF16 = 1 / 15
"""Of the rate of matrix products: the CUDA cores', without TF32 (data sheets of A100 and H100)."""
FORWARD_SHARE = 1 / 3
"""Of a micro-batch's time and FLOPs, forward and backward together."""
HIDDEN_UNDER = 0.8
"""Share of a micro-batch's time under which data ranks can exchange."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of one step on the critical path; the parts add up to `seconds`."""

    matmul: float
    attention: float
    elementwise: float
    launch: float
    node_links: float
    """Tensor, context and expert traffic that is not hidden."""
    host_links: float
    """Copies of activations to and from host memory that the layers' own work does not hide."""
    pipeline_links: float
    bubble: float
    data_links: float
    optimizer: float
    teacher: float = 0.0
    """Its forward passes; of a teacher on GPUs of its own, what they take longer than all of the above."""
    tokens_per_gpu: float
    """Tokens a step, over all GPUs."""
    model_flops_per_token: float
    bf16_flops: float

    @property
    def seconds(self) -> float:
        """The step."""
        return (
            self.matmul
            + self.attention
            + self.elementwise
            + self.launch
            + self.node_links
            + self.host_links
            + self.pipeline_links
            + self.bubble
            + self.data_links
            + self.optimizer
            + self.teacher
        )

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Throughput."""
        return self.tokens_per_gpu / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs over the dense bf16 peak, also in fp8: causal attention counted half, no recomputation.

        A teacher's forward passes count.
        """
        return self.tokens_per_s_per_gpu * self.model_flops_per_token / self.bf16_flops


@dataclass(frozen=True, slots=True)
class Work:
    """Seconds of one micro-batch on one stage, forward and backward."""

    matmul: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    launch: float = 0.0
    node_links: float = 0.0
    host_links: float = 0.0

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.matmul + self.attention + self.elementwise + self.launch + self.node_links + self.host_links

    def times(self, factor: float) -> Work:
        """This much of it."""
        return Work(
            self.matmul * factor,
            self.attention * factor,
            self.elementwise * factor,
            self.launch * factor,
            self.node_links * factor,
            self.host_links * factor,
        )

    def plus(self, other: Work) -> Work:
        """Both."""
        return Work(
            self.matmul + other.matmul,
            self.attention + other.attention,
            self.elementwise + other.elementwise,
            self.launch + other.launch,
            self.node_links + other.node_links,
            self.host_links + other.host_links,
        )


def step_time(
    shape: Shape, layout: Layout, gpu: Gpu, constants: Constants = FITTED, teacher: Teacher | None = None
) -> StepTime:
    """Time of one step of `layout.global_batch` sequences."""
    flops, teaching = shape.train_flops_per_token(layout.sequence), 0.0
    if teacher is not None:
        teaching = teacher_seconds(teacher, layout, gpu, constants)
        flops += FORWARD_SHARE * teacher.shape.train_flops_per_token(layout.sequence)
    if layout.precision == "fp32":
        forward, backward = gpu.attention_flops
        gpu = replace(
            gpu,
            bf16_gemm_flops=gpu.bf16_gemm_flops * FP32_OVER_BF16,
            attention_flops=(forward * FP32_OVER_BF16, backward * FP32_OVER_BF16),
        )
    layer, head = layer_work(shape, layout, gpu, constants), head_work(shape, layout, gpu, constants)
    ends = {0, layout.pipeline // 2, layout.pipeline - 1}
    body = layer.times(max(layers_of_stage(shape, layout, stage) for stage in ends))
    last = layer.times(layers_of_stage(shape, layout, layout.pipeline - 1)).plus(head)
    slowest = max(body, last, key=lambda work: work.seconds)
    rounds = layout.micro_batches
    steady = slowest.times(rounds)
    # The first micro-batch fills the other stages, the last drains them: a chunk at a time where interleaved.
    bubble = (layout.pipeline - 1) / layout.virtual_pipeline * body.seconds
    return StepTime(
        matmul=steady.matmul,
        attention=steady.attention,
        elementwise=steady.elementwise,
        launch=steady.launch,
        node_links=steady.node_links,
        host_links=steady.host_links,
        pipeline_links=_pipeline_seconds(shape, layout, gpu, constants),
        bubble=bubble,
        data_links=_data_seconds(shape, layout, gpu, constants, slowest.seconds),
        optimizer=_optimizer_seconds(shape, layout, gpu) + constants.step_seconds,
        teacher=teaching,
        tokens_per_gpu=layout.global_batch * layout.sequence / layout.num_gpus,
        model_flops_per_token=flops,
        bf16_flops=gpu.bf16_flops,
    )


def teacher_seconds(teacher: Teacher, layout: Layout, gpu: Gpu, constants: Constants = FITTED) -> float:
    """A teacher's forward passes over a step's micro-batches: nothing is recomputed, reduced or updated."""
    whole = step_time(teacher.shape, replace(layout, recompute="none"), gpu, constants)
    computing = whole.matmul + whole.attention + whole.elementwise + whole.launch + whole.node_links + whole.bubble
    return FORWARD_SHARE * computing + whole.pipeline_links / 2


def layer_work(shape: Shape, layout: Layout, gpu: Gpu, constants: Constants) -> Work:
    """One layer, one micro-batch, forward and backward, recomputation included."""
    fraction = _recomputed_forwards(shape, layout)
    work = Work(
        matmul=_layer_matmul_seconds(shape, layout, gpu, constants, fraction.matmul),
        attention=_attention_seconds(shape, layout, gpu, constants, fraction.attention),
        elementwise=_layer_elementwise_seconds(shape, layout, gpu, constants, fraction.elementwise),
        launch=constants.layer_seconds * (1 + fraction.elementwise / 3),
        node_links=_node_seconds(shape, layout, gpu, constants, fraction.links),
    )
    return replace(work, host_links=_host_seconds(shape, layout, work.seconds)) if layout.offload_activations else work


def _host_seconds(shape: Shape, layout: Layout, layer_seconds: float) -> float:
    """What copying a layer's activations out and in again takes beyond the passes it goes on beside."""
    copy = saved_bytes(shape, layout) / PCIE_BANDWIDTH
    forward = FORWARD_SHARE * layer_seconds
    return max(0.0, copy - forward) + max(0.0, copy - (layer_seconds - forward))


@dataclass(frozen=True, slots=True)
class _Recomputed:
    """Forward passes that are done again."""

    matmul: float
    attention: float
    elementwise: float
    links: float


def _recomputed_forwards(shape: Shape, layout: Layout) -> _Recomputed:
    match layout.recompute:
        case "none":
            return _Recomputed(0.0, 0.0, 0.0, 0.0)
        case "full":
            return _Recomputed(1.0, 1.0, 1.0, 1.0)
        case "mlp":
            feed_forward = shape.experts_per_token * shape.expert_weights
            return _Recomputed(feed_forward / (shape.attention_weights + feed_forward), 0.0, 0.3, 0.5)
        case "selective":
            if layout.stack.selective_is_by_operation:
                return _Recomputed(0.5, 0.0, 1.0, 0.5)
            # Core attention runs again, also where a fused kernel leaves nothing to be saved by it.
            return _Recomputed(0.0, 1.0, 0.0, 0.0)


def head_work(shape: Shape, layout: Layout, gpu: Gpu, constants: Constants) -> Work:
    """Output head and loss of one micro-batch; always in bf16."""
    columns = shape.vocab / layout.tensor
    product = _Product(layout.tokens, columns, shape.hidden)
    seconds = 3 * _matmul_seconds(product, gpu, constants, is_fp8=False)
    traffic = layout.tokens * columns * layout.stack.loss_traffic
    return Work(matmul=seconds, elementwise=traffic / gpu.memory_bandwidth)


@dataclass(frozen=True, slots=True)
class _Product:
    rows: float
    columns: float
    inner: float
    copies: float = 1.0
    """Separate weight matrices the rows are dealt to: the experts of this rank."""

    @property
    def weights(self) -> float:
        return self.columns * self.inner * self.copies

    @property
    def flops(self) -> float:
        return 2 * self.rows * self.columns * self.inner


def _matmul_seconds(product: _Product, gpu: Gpu, constants: Constants, *, is_fp8: bool) -> float:
    rate = gpu.fp8_gemm_flops * constants.fp8_gemm_share if is_fp8 else gpu.bf16_gemm_flops * constants.gemm_share
    operands = product.rows * product.inner + product.weights
    traffic = operands * (1 if is_fp8 else 2) + 2 * product.rows * product.columns
    return product.flops / rate + constants.gemm_traffic * traffic / gpu.memory_bandwidth


def _products(shape: Shape, layout: Layout) -> tuple[_Product, ...]:
    tokens, tensor, hidden = layout.tokens, layout.tensor, shape.hidden
    routed, experts = tokens * shape.experts_per_token, shape.experts / layout.expert
    return (
        _Product(tokens, (shape.query_width + 2 * shape.kv_width) / tensor, hidden),
        _Product(tokens, hidden, shape.query_width / tensor),
        _Product(routed, (2 if shape.gated else 1) * shape.ffn / tensor, hidden, experts),
        _Product(routed, hidden, shape.ffn / tensor, experts),
    )


def _layer_matmul_seconds(shape: Shape, layout: Layout, gpu: Gpu, constants: Constants, recomputed: float) -> float:
    is_fp8 = layout.precision == "fp8" and gpu.fp8_gemm_flops > 0
    products = _products(shape, layout)
    forward = sum(_matmul_seconds(product, gpu, constants, is_fp8=is_fp8) for product in products)
    # Weight gradients are added to buffers of their own: read and written once a micro-batch.
    weights = sum(product.weights for product in products)
    accumulation = 2 * layout.stack.gradient_bytes * weights / gpu.memory_bandwidth
    return (3 + recomputed) * forward + constants.gemm_traffic * accumulation


def _attention_seconds(shape: Shape, layout: Layout, gpu: Gpu, constants: Constants, recomputed: float) -> float:
    rates = gpu.attention_flops if layout.stack.attention == "vendor" else gpu.flash_attention_flops
    kernel = FLASH1_OVER_FLASH2 if layout.stack.attention == "flash1" else 1.0
    ramp = layout.sequence / (layout.sequence + constants.attention_ramp_tokens)
    reached = constants.attention_share * kernel * ramp
    forward = 2 * layout.sequence * layout.tokens * shape.query_width / layout.tensor
    if layout.unfused_attention:
        # Two matrix products over the whole square, and the scores written and read by mask, softmax and dropout.
        scores = shape.heads / layout.tensor * layout.sequence * layout.tokens
        products = (3 + recomputed) * 2 * forward / (gpu.bf16_gemm_flops * constants.gemm_share)
        return products + (3 + recomputed) * SCORE_TRAFFIC * scores / gpu.memory_bandwidth
    return (1 + recomputed) * forward / (rates[0] * reached) + 2.5 * forward / (rates[1] * reached)


def _layer_elementwise_seconds(
    shape: Shape, layout: Layout, gpu: Gpu, constants: Constants, recomputed: float
) -> float:
    split, tensor, tokens = layout.sequence_split, layout.tensor, layout.tokens
    ffn = shape.ffn * shape.experts_per_token
    # Forward, least traffic: two norms (read, write), two residual sums (read two, write one), rotation, activation.
    # In elementary operations a norm casts, squares, scales and casts back, and a rotation goes through fp32.
    norm, turn, gate = (14, 20, 10) if layout.stack.decomposed else (4, 4, 6)
    residual = (2 * norm + 12) * shape.hidden / split
    rotation = turn * (shape.query_width + shape.kv_width) / tensor
    activation = (gate if shape.gated else 4) * ffn / tensor
    # Tokens are copied to their experts and back, and scaled.
    dispatch = 8 * shape.hidden * shape.experts_per_token / tensor if shape.experts > 1 else 0.0
    traffic = (3 + recomputed) * (residual + rotation + activation + dispatch)
    if layout.precision == "fp8" and gpu.fp8_gemm_flops > 0:
        # Each operand is read and written as fp8 twice, once transposed; read once more where its scale is its own.
        inputs = 2 * shape.hidden / split + (shape.query_width + ffn) / tensor
        gradients = (
            2 * shape.hidden / split
            + (shape.query_width + 2 * shape.kv_width + (2 if shape.gated else 1) * ffn) / tensor
        )
        traffic += (6 if layout.current_scaling else 4) * (inputs * (1 + recomputed) + gradients)
    times = constants.fused_traffic if layout.stack.fused else constants.eager_traffic
    return times * tokens * traffic / gpu.memory_bandwidth


def _node_seconds(shape: Shape, layout: Layout, gpu: Gpu, constants: Constants, recomputed: float) -> float:
    tokens, tensor, context = layout.tokens, layout.tensor, layout.context
    seconds = 0.0
    if tensor > 1:
        # Gather before, scatter after attention and feed-forward; the backward pass gathers its inputs once more.
        exchanges = 4 * (1 + recomputed) + 6
        volume = exchanges * tokens * shape.hidden * 2 * (tensor - 1) / tensor
        seconds += volume / _bandwidth(gpu, members=tensor, ranks=tensor)
    if context > 1:
        keys = 2 * shape.kv_width / tensor * 2 * tokens
        volume = (1 + recomputed + 2) * keys * (context - 1)
        seconds += volume / _bandwidth(gpu, members=context, ranks=tensor * context)
    if layout.expert > 1:
        routed = 2 * tokens * shape.experts_per_token * shape.hidden * 2 / tensor
        volume = (2 + recomputed) * routed * (layout.expert - 1) / layout.expert
        seconds += volume / _bandwidth(gpu, members=layout.expert, ranks=tensor * context * layout.expert)
    return constants.exposed_node * seconds


def _bandwidth(gpu: Gpu, *, members: int, ranks: int) -> float:
    """Of a ring over `members` of adjacent ranks that span `ranks`: NVLink, or the cards of those that share a node."""
    if ranks <= gpu.gpus_per_node:
        return gpu.nvlink_bandwidth
    stride = max(1, ranks // members)
    sharing = max(1, gpu.gpus_per_node // stride)
    return min(gpu.nvlink_bandwidth, sharing * gpu.network_bandwidth)


def _pipeline_seconds(shape: Shape, layout: Layout, gpu: Gpu, constants: Constants) -> float:
    if layout.pipeline == 1:
        return 0.0
    message = layout.tokens * shape.hidden * 2 / layout.sequence_split
    bandwidth = gpu.nvlink_bandwidth if layout.num_gpus <= gpu.gpus_per_node else gpu.network_bandwidth
    sends = 2 * layout.micro_batches * layout.virtual_pipeline + 2 * (layout.pipeline - 1)
    # Interleaved schedules send while they compute.
    exposed = 1.0 if layout.virtual_pipeline == 1 else constants.exposed_data
    return exposed * sends * message / bandwidth


def _data_seconds(shape: Shape, layout: Layout, gpu: Gpu, constants: Constants, micro_batch_seconds: float) -> float:
    group = layout.data * layout.context
    if group == 1:
        return 0.0
    stack, inner = layout.stack, layout.tensor
    local = sum(stage_parameters(shape, layout, 0))
    bandwidth = _bandwidth(gpu, members=group, ranks=inner * group)
    nodes = max(1.0, inner * group / gpu.gpus_per_node)
    share = local * (group - 1) / group / bandwidth
    if layout.sharding == "zero3":
        # Under a pipeline, layers stay gathered for the whole step.
        passes = layout.micro_batches if layout.pipeline == 1 else 1
        gathers = (2 if layout.pipeline == 1 else 1) * passes * 2 * share
        scatters = passes * stack.gradient_bytes * share
        rings = 3 * shape.layers / layout.pipeline * passes
        computing = passes * micro_batch_seconds
    else:
        gathers, scatters = 2 * share, stack.gradient_bytes * share
        rings = 2 * max(1.0, local / BUCKET_PARAMETERS)
        # Only the last micro-batch's backward pass and the first one's forward pass run beside them.
        computing = micro_batch_seconds
    total = gathers + scatters
    beyond = max(0.0, total - HIDDEN_UNDER * computing)
    exposed = constants.exposed_shards if layout.sharding == "zero3" else constants.exposed_data
    hops = rings * (group - 1) * constants.hop_seconds if nodes > 1 else 0.0
    return beyond + exposed * (total - beyond) + hops


def _optimizer_seconds(shape: Shape, layout: Layout, gpu: Gpu) -> float:
    local = sum(stage_parameters(shape, layout, 0))
    updated = local / (layout.shards if layout.sharding != "none" else 1)
    if layout.offload != "none":
        host = OPTIMIZER_TRAFFIC / HOST_BANDWIDTH
        if layout.offload == "nvme":
            # Adam works while the disk reads and writes, all of it once a step.
            host = max(host, OFFLOADED_STATE_BYTES / NVME_READ_BANDWIDTH + OFFLOADED_STATE_BYTES / NVME_WRITE_BANDWIDTH)
        return updated * (host + 6 / PCIE_BANDWIDTH)
    return updated * OPTIMIZER_TRAFFIC / gpu.memory_bandwidth
