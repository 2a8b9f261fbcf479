"""How a model is spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from conf.schema.types import PositiveInt, Precision, Strict


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshConfig(Strict):
    """Sizes of the parallel axes; the product of all but `expert` is the number of ranks."""

    tensor: PositiveInt = 1
    context: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual_pipeline: PositiveInt = 1
    """Layer chunks a pipeline rank holds; above 1 the schedule is interleaved."""
    data: PositiveInt | None = None
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
    offload_optimizer: Literal["none", "cpu", "nvme"]
    """Where optimizer state lives: with the weights, in host memory, or in a file; Adam runs where it can be read."""
    overlap: bool
    """Overlap gradient reduction (and gathering of split weights) with computation."""
    recompute: Literal["none", "selective", "full"]
    """What of a layer is computed again in the backward pass instead of kept: nothing, the feed-forward layer, all."""
    offload_directory: str | None = None
    """Of a local disk of every node, for `offload_optimizer: nvme`; a rank's file in it has no name."""
    offload_activations: bool = False
    """Keep what layers save for the backward pass in host memory, all but two layers of it."""
    compile: bool = False
    """Compile each layer into few kernels; takes a minute at the start."""

    @property
    def weight_precision(self) -> Precision:
        """What weights and activations are kept in."""
        return "fp32" if self.precision == "fp32" else "bf16"

    @property
    def product_multiple(self) -> int:
        """What every side of a matrix product of a layer is a multiple of on a rank."""
        return 16 if self.precision.startswith("fp8") else 1
