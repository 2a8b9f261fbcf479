"""Sizes of the parallel axes, and which rank sits where. Arithmetic only.

Rank order is Megatron-core's `tp-cp-dp-pp`: tensor ranks are adjacent (they talk most, over NVLink), pipeline ranks are
farthest apart.

Expert ranks share the experts of a layer. They are no axis of their own: the ranks that hold equal dense weights, data
and context ranks, are cut into expert groups of adjacent ranks, so the product of the other axes is the world.
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
    """Sizes of the parallel axes; `expert` divides data x context."""

    pipeline: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        for axis in ("pipeline", "data", "context", "tensor", "expert"):
            size = getattr(self, axis)
            if size < 1:
                raise ValueError(f"mesh axis {axis} has size {size}; every axis has at least 1")
        if self.num_replicas % self.expert:
            raise ValueError(
                f"expert groups of {self.expert} ranks do not divide data {self.data} x context {self.context}"
            )

    def __str__(self) -> str:
        text = f"tensor {self.tensor} x context {self.context} x data {self.data} x pipeline {self.pipeline}"
        return text if self.expert == 1 else f"{text}, expert {self.expert}"

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.pipeline * self.data * self.context * self.tensor

    @property
    def num_replicas(self) -> int:
        """Ranks that hold the same dense weights: data and context ranks."""
        return self.data * self.context

    @property
    def num_expert_replicas(self) -> int:
        """Ranks that hold the same experts."""
        return self.num_replicas // self.expert

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

    def replica(self, coordinate: Coordinate) -> int:
        """Place among the ranks that hold the same dense weights."""
        return coordinate.data * self.context + coordinate.context

    def expert_rank(self, coordinate: Coordinate) -> int:
        """Place within an expert group: which part of the experts the rank holds."""
        return self.replica(coordinate) % self.expert

    def expert_replica(self, coordinate: Coordinate) -> int:
        """Place among the ranks that hold the same experts."""
        return self.replica(coordinate) // self.expert
