"""The numbers of the cost model that are fitted to public measurements. `python -m bench.plan --fit` derives them.

Each is a physical quantity that no data sheet states; they are the same for every model, layout, GPU and source.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Constants:
    """Fitted once, over all rows."""

    gemm_share: float = 0.90
    """Of the GEMM rate alone, what is left in a step, where memory traffic and links take power too."""
    fp8_gemm_share: float = 0.80
    attention_share: float = 0.80
    """The same for attention."""
    attention_ramp_tokens: float = 512.0
    """Sequence at which attention reaches half its rate."""
    fused_traffic: float = 1.3
    """Memory traffic of element-wise work over its least, kernels fused as in Megatron-core and compiled code."""
    eager_traffic: float = 2.0
    """The same where every operation is a kernel of its own."""
    gemm_traffic: float = 1.5
    """Memory traffic of matrix products over reading and writing each operand once."""
    layer_seconds: float = 1e-4
    """Launch gaps of one layer, forward and backward."""
    exposed_node: float = 0.7
    """Share of tensor, context and expert traffic that computation does not hide."""
    exposed_data: float = 0.2
    """The same for gradients and parameters of data ranks, beyond what there is no computation to hide it under."""
    hop_seconds: float = 4e-6
    """One hop of a ring between nodes."""
    step_seconds: float = 0.01
    """Once a step: data, clipping, logging."""


FITTED = Constants()
