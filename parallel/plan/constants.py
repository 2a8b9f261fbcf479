"""The numbers of the cost model that are fitted to public measurements. `python -m bench.plan --fit` derives them.

Each is a physical quantity that no data sheet states; they are the same for every model, layout, GPU and source.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Constants:
    """Fitted once, over all rows."""

    gemm_share: float = 0.884
    """Of the GEMM rate alone, what is left in a step, where memory traffic and links take power too."""
    fp8_gemm_share: float = 0.934
    attention_share: float = 0.96
    """The same for attention."""
    attention_ramp_tokens: float = 432
    """Sequence at which attention reaches half its rate."""
    fused_traffic: float = 1.37
    """Memory traffic of element-wise work over its least, kernels fused as in Megatron-core and compiled code."""
    eager_traffic: float = 1.6
    """The same where every operation is a kernel of its own."""
    gemm_traffic: float = 0.621
    """Memory traffic of matrix products, each operand once, that their arithmetic does not hide."""
    layer_seconds: float = 9.64e-05
    """Launch gaps of one layer, forward and backward."""
    exposed_node: float = 0.766
    """Share of tensor, context and expert traffic that computation does not hide."""
    exposed_data: float = 0.172
    """The same for gradients and parameters of data ranks, where there is computation to hide it under."""
    exposed_shards: float = 0.768
    """The same where every layer is gathered before it is used (FSDP, ZeRO-3)."""
    hop_seconds: float = 1.9e-06
    """One hop of a ring between nodes."""
    step_seconds: float = 0.0627
    """Once a step: data, clipping, logging."""


FITTED = Constants()
