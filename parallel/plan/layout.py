"""How a model is spread over GPUs, and the software that runs it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Sharding = Literal["none", "zero1", "zero2", "zero3"]
Recompute = Literal["none", "selective", "mlp", "full"]
Precision = Literal["fp32", "bf16", "fp8"]
Offload = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """Facts of a training software, per token and layer unless it says otherwise."""

    name: str
    fused: bool
    """Element-wise operations are fused into few kernels."""
    decomposed: bool
    """Norms, rotation and activation are written in elementary operations that nothing fuses."""
    attention: Literal["vendor", "flash2", "flash1"]
    """The kernel: cuDNN or better, FlashAttention-2, or the first FlashAttention."""
    logit_bytes: float
    """Peak bytes an output logit takes: copies in bf16 and fp32 that live at once."""
    loss_traffic: float
    """Bytes read and written a logit by the loss and its gradient."""
    state_bytes: float
    """Bytes a parameter of weights and gradients together where they are not sharded."""
    optimizer_bytes: float
    """Master weights and moments."""
    gradient_bytes: int
    """Bytes a gradient is reduced in."""
    saves_fp8: bool
    """Inputs of fp8 matrix products are kept for the backward pass as fp8."""
    selective_is_by_operation: bool
    """Selective recomputation keeps every other matrix product (torchtitan), not all but core attention (Megatron)."""
    interleaves: bool = False
    """Pipeline ranks can hold several chunks of layers."""
    extra_saved: float = 0.0
    """Bytes kept a token and layer beyond what the backward formulas need, over the hidden size."""
    extra_saved_ffn: float = 0.0
    """The same over the feed-forward width."""
    slices: Literal["nothing", "loss", "head"] = "nothing"
    """What works on a slice of the tokens at a time: the loss, or head and loss together, so that no tensor of all
    logits exists."""
    keeps_projection: bool = False
    """Values are kept as a view of the fused query-key-value product, rotary angles beside them; context ranks gather
    the keys and values of the whole sequence instead of passing them round."""


MEGATRON = Stack(
    name="megatron",
    fused=True,
    decomposed=False,
    attention="vendor",
    logit_bytes=6,  # bf16 logits and the fp32 copy that the loss works on in place
    loss_traffic=48,  # cast, maximum, difference, exponential, sum, quotient, and back
    state_bytes=6,  # bf16 weights, fp32 gradients
    optimizer_bytes=12,
    gradient_bytes=4,
    saves_fp8=True,
    selective_is_by_operation=False,
    interleaves=True,
)
OURS = replace(
    MEGATRON,
    name="frontier",
    logit_bytes=4,  # bf16 logits and their gradient
    slices="head",
    keeps_projection=True,
)
"""The Megatron engine of this project; `bench/memory.py` measures what it keeps."""
OURS_ON_DEEPSPEED = replace(OURS, name="frontier on deepspeed", slices="loss", interleaves=False)
"""The same modules driven by DeepSpeed, gradients accumulated in fp32; its head returns all logits."""
TORCHTITAN = Stack(
    name="fsdp2",
    fused=True,
    decomposed=False,
    attention="flash2",
    logit_bytes=12,  # bf16, fp32 copy, log-softmax, its gradient
    loss_traffic=24,
    state_bytes=8,  # fp32 weights and gradients
    optimizer_bytes=8,
    gradient_bytes=4,
    saves_fp8=False,
    selective_is_by_operation=True,
)
COMPOSER = Stack(
    name="fsdp",
    fused=False,
    decomposed=False,
    attention="flash1",
    logit_bytes=10,
    loss_traffic=16,  # one fused kernel each way
    state_bytes=8,
    optimizer_bytes=8,
    gradient_bytes=2,
    saves_fp8=True,
    selective_is_by_operation=False,
    extra_saved=4,
)
DEEPSPEED = Stack(
    name="deepspeed",
    fused=False,
    decomposed=True,
    attention="flash2",
    logit_bytes=18,  # Hugging Face: bf16, fp32, shifted copy, log-softmax, its gradient
    loss_traffic=60,
    state_bytes=4,  # bf16 both
    optimizer_bytes=12,
    gradient_bytes=2,
    saves_fp8=False,
    selective_is_by_operation=False,
    extra_saved=6.5,  # rotated queries and keys, residual sums
    extra_saved_ffn=2,  # SiLU and product apart
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One way to run a step. Sizes of axes multiply to the number of GPUs (experts share the data axis)."""

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    data: int = 1
    expert: int = 1
    micro_batch: int = 1
    global_batch: int = 1
    sequence: int = 4096
    precision: Precision = "bf16"
    current_scaling: bool = False
    """fp8 scales come from the tensor itself, not from the steps before: one more pass over it."""
    recompute: Recompute = "none"
    sharding: Sharding = "zero1"
    optimizer_copies: int = 1
    """Groups of data ranks that each hold all of the sharded state (hybrid sharding)."""
    sequence_parallel: bool = True
    stack: Stack = MEGATRON
    unfused_attention: bool = False
    """Attention scores are written out (debugging, old kernels)."""
    chunked_loss: bool = False
    """The loss never holds all logits (Liger, chunked cross-entropy)."""
    offload: Offload = "none"
    """Where optimizer state and master weights live: on the GPU, in host memory, or on a local disk."""
    offload_activations: bool = False
    """What layers keep for the backward pass lives in host memory, but for those at work."""

    @property
    def num_gpus(self) -> int:
        """GPUs in all."""
        return self.tensor * self.context * self.pipeline * self.data

    @property
    def shards(self) -> int:
        """Ranks that sharded state is split over."""
        return max(1, self.data * self.context // self.optimizer_copies)

    @property
    def micro_batches(self) -> int:
        """Micro-batches a data rank takes in a step, rounded up."""
        return max(1, -(-self.global_batch // (self.data * self.micro_batch)))

    @property
    def element_bytes(self) -> int:
        """Bytes of a weight in computation, and of an activation."""
        return 4 if self.precision == "fp32" else 2

    @property
    def tokens(self) -> float:
        """Tokens of a micro-batch on one rank."""
        return self.micro_batch * self.sequence / self.context

    @property
    def sequence_split(self) -> int:
        """Over how many tensor ranks norms and residuals are split."""
        return self.tensor if self.sequence_parallel else 1
