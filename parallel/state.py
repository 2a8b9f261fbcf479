"""Between this rank's flat parameters and shards, and pieces of canonical tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from parallel.boxes import Box, runs_of_range
from parallel.engine import Piece, TensorSource


def pieces_of(values: Tensor, stack: Sequence[Box], start: int, *, prefix: str = "") -> Iterator[Piece]:
    """Elements of a local parameter that is a stack of boxes, as pieces that view `values`.

    Args:
        values: flat run of elements.
        stack: what the rows of the whole local parameter are.
        start: where the run begins in the flattened parameter.
        prefix: goes before the canonical names.
    """
    for run in runs_of_range(stack, start, start + values.numel()):
        tensor = values[run.start - start : run.stop - start].view(run.box.shape)
        yield Piece(prefix + run.box.name, run.box.global_shape, run.box.offset, tensor)


def read_range(source: TensorSource, stack: Sequence[Box], start: int, stop: int, *, prefix: str = "") -> Tensor:
    """The elements [start, stop) of a local parameter that is a stack of boxes: flat, float32, on the CPU."""
    flat = torch.empty(stop - start, dtype=torch.float32)
    for run in runs_of_range(stack, start, stop):
        box = run.box
        flat[run.start - start : run.stop - start].view(box.shape).copy_(
            source.read(prefix + box.name, box.offset, box.shape)
        )
    return flat
