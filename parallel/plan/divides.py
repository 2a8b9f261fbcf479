"""Which layouts divide the model, the sequence and the batch; the search and the checks before launch share these."""

from __future__ import annotations

import math


def divisors(value: int) -> list[int]:
    """All divisors, ascending."""
    return [size for size in range(1, value + 1) if value % size == 0]


def tensor_sizes(*widths: int, ranks_per_node: int) -> list[int]:
    """Tensor ranks that share a node, and all widths evenly: heads, key-value heads, feed-forward, vocabulary."""
    return divisors(math.gcd(ranks_per_node, *widths))


def pieces_of_sequence(*, context: int, tensor: int, sequence_parallel: bool) -> int:
    """What the tokens of a sequence must be a multiple of."""
    # Causal attention is balanced by giving each context rank one chunk from either end.
    pieces = 2 * context if context > 1 else 1
    return math.lcm(pieces, context * tensor) if sequence_parallel else pieces


def batch_multiple(*, data: int, micro_batch: int, pipeline: int, virtual_pipeline: int) -> int:
    """What the sequences of a step must be a multiple of: whole micro-batches, in whole rounds where interleaved."""
    return data * micro_batch * (pipeline if virtual_pipeline > 1 else 1)
