"""Micro-batches through the chunks of a model, in the order of Megatron's pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from data.batch import Batch
from parallel.inputs import Inputs, inputs_of_rank
from parallel.mesh import Coordinate, Mesh
from parallel.plan.divides import pieces_of_sequence

LossOfOutput = Callable[[Inputs, Tensor], tuple[Tensor, Tensor, Any]]
"""What the last stage makes of a micro-batch: loss and count as Megatron wants them, and what is to be kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How micro-batches of one shape are put through.

    Attributes:
        mesh: the axes.
        coordinate: of this rank.
        device: of this rank.
        micro_batch: rows of every micro-batch.
        virtual_pipeline: chunks a rank.
        splits_sequence: tensor ranks hold parts of the sequence between layers.
    """

    mesh: Mesh
    coordinate: Coordinate
    device: torch.device
    micro_batch: int
    virtual_pipeline: int
    splits_sequence: bool

    def inputs(self, micro_batches: Sequence[Batch]) -> list[Inputs]:
        """What this rank sees of each micro-batch, on its device.

        Raises:
            ValueError: micro-batches differ in shape, have other rows than expected, or cannot be split.
        """
        self._check_shapes(micro_batches)
        return [inputs_of_rank(batch, self.mesh, self.coordinate, self.device) for batch in micro_batches]

    def run(
        self,
        models: Sequence[Any],
        micro_batches: Sequence[Batch],
        losses: Sequence[LossOfOutput],
        *,
        forward_only: bool = False,
    ) -> list[Any]:
        """Put micro-batches through, forward and, unless told otherwise, backward.

        Args:
            models: the chunks of this rank, or what they are wrapped in.
            micro_batches: of this data rank.
            losses: one a micro-batch.
            forward_only: no gradients are made.

        Returns:
            On the last pipeline rank what each loss returned third for its micro-batch; else nothing.
        """
        inputs = self.inputs(micro_batches)
        pairs = list(zip(inputs, losses, strict=True))

        def forward(iterator: Iterator[Any], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
            given, loss = next(iterator)
            return given.through(model), partial(loss, given)

        virtual = self.virtual_pipeline
        schedule = get_forward_backward_func(self.mesh.pipeline, virtual if virtual > 1 else None)
        outputs: list[Any] = schedule(
            forward_step_func=forward,
            data_iterator=[iter(pairs) for _ in range(virtual)],
            model=models,
            num_microbatches=len(inputs),
            seq_length=micro_batches[0].tokens_BS.shape[1],
            micro_batch_size=self.micro_batch,
            forward_only=forward_only,
        )
        return outputs

    def look(self, models: Sequence[Any], micro_batches: Sequence[Batch], loss: LossOfOutput) -> list[Any]:
        """Forward passes only, without activation recomputation; returns as `run`.

        What hooks keep of the forward passes may be that of more micro-batches: the last ones are repeated.
        """
        for model in models:
            model.eval()
        # The interleaved schedule takes multiples of the pipeline size; what is added is dropped again.
        padding = -len(micro_batches) % self.mesh.pipeline if self.virtual_pipeline > 1 else 0
        padded = [*micro_batches, *list(micro_batches[-1:]) * padding]
        found = self.run(models, padded, [loss] * len(padded), forward_only=True)
        for model in models:
            model.train()
        return found[: len(micro_batches)]

    def _check_shapes(self, micro_batches: Sequence[Batch]) -> None:
        shapes = {batch.tokens_BS.shape for batch in micro_batches}
        if len(shapes) != 1:
            raise ValueError(f"micro-batches of a step have one shape, and there is at least one; got {sorted(shapes)}")
        num_rows, num_tokens = shapes.pop()
        if num_rows != self.micro_batch:
            raise ValueError(f"micro-batches have {num_rows} rows; this engine was made for {self.micro_batch}")
        parts = pieces_of_sequence(
            context=self.mesh.context, tensor=self.mesh.tensor, sequence_parallel=self.splits_sequence
        )
        if num_tokens % parts:
            raise ValueError(f"rows have {num_tokens} tokens, which must be a multiple of {parts} ({self.mesh})")
