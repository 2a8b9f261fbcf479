"""Sizes of the parallel axes, and which rank sits where. Arithmetic only.

Rank order is Megatron-core's `tp-cp-dp-pp`: tensor ranks are adjacent (they talk most, over NVLink), pipeline ranks are
farthest apart.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Coordinate:
    """Place of a rank on the mesh."""

    pipeline: int
    data: int
    context: int
    tensor: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Mesh:
    """Sizes of the parallel axes."""

    pipeline: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis in ("pipeline", "data", "context", "tensor"):
            size = getattr(self, axis)
            if size < 1:
                raise ValueError(f"mesh axis {axis} has size {size}; every axis has at least 1")

    def __str__(self) -> str:
        return f"tensor {self.tensor} x context {self.context} x data {self.data} x pipeline {self.pipeline}"

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.pipeline * self.data * self.context * self.tensor

    def coordinate(self, rank: int) -> Coordinate:
        """Place of a global rank.

        Raises:
            ValueError: rank is not in [0, world_size).
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside the mesh of {self.world_size} ranks ({self})")
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data)
        return Coordinate(pipeline=pipeline, data=data, context=context, tensor=tensor)

    def rank(self, coordinate: Coordinate) -> int:
        """Global rank of a place; the inverse of `coordinate`."""
        outer = coordinate.pipeline * self.data + coordinate.data
        return (outer * self.context + coordinate.context) * self.tensor + coordinate.tensor
