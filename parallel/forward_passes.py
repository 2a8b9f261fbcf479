"""What forward passes alone tell about a model: scores, logits, outputs of layers, importance, ranges of inputs.

The part of `Engine` that needs no optimizer, and that both engines have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from conf.schema import EngineConfig, ModelConfig, Scheme
from data.batch import Batch
from parallel import weight_names
from parallel.compilation import compile_layers
from parallel.engine import Logits, RowScores
from parallel.head import keep_hidden, score_rows
from parallel.hidden_states import keep_outputs
from parallel.importance import Importance, Observer, Share
from parallel.inputs import Inputs
from parallel.memory_errors import naming_memory_errors
from parallel.mesh import Mesh
from parallel.quantisation import round_inputs
from parallel.ranges import Channels, RangeObserver
from parallel.schedule import LossOfOutput, Schedule
from parallel.sharded_model import ShardedModel

T = TypeVar("T")


class ForwardPasses:
    """A model spread over a mesh that is looked at. Megatron's groups must be those of the mesh as long as it is used.

    Args:
        keeps_hidden: the head is multiplied with where logits are wanted, a slice at a time; else the model does it.
    """

    _trains = False

    def __init__(
        self, model: ModelConfig, engine: EngineConfig, mesh: Mesh, *, micro_batch: int, keeps_hidden: bool
    ) -> None:
        self._sharded = ShardedModel(model, engine, mesh)
        self.mesh = mesh
        self.coordinate = self._sharded.coordinate
        self.num_parameters = weight_names.num_parameters(model)
        self._model = model
        self._engine = engine
        self._keeps_hidden = keeps_hidden
        self._chunks = self._sharded.chunks
        if self._sharded.is_last and keeps_hidden:
            keep_hidden(self._chunks[-1])
        if engine.compile:
            compile_layers(self._chunks)
        self._models: list[Any] = self._chunks
        """What micro-batches go through."""
        self._schedule = Schedule(
            mesh=mesh,
            coordinate=self.coordinate,
            device=self._sharded.device,
            micro_batch=micro_batch,
            virtual_pipeline=engine.mesh.virtual_pipeline,
            splits_sequence=engine.sequence_parallel,
        )
        self._outputs: dict[int, list[Tensor]] = {}
        self._rounding: list[Any] = []
        """Hooks of `round_inputs`."""

    @torch.no_grad()
    def score(self, micro_batches: Sequence[Batch]) -> RowScores:
        """See `Engine.score`."""
        rows: list[Tensor] = self._look(micro_batches, self._row_scores)
        num_rows = len(micro_batches) * self._schedule.micro_batch
        device = self._sharded.device
        table = torch.zeros(self.mesh.data, num_rows, 3, dtype=torch.float64, device=device)
        ids = torch.zeros(self.mesh.data, num_rows, dtype=torch.int64, device=device)
        mine = self.coordinate.data
        if self._sharded.is_last and self.coordinate.tensor == 0:
            table[mine] = torch.cat(rows)  # a context rank's part of the sequence
            if self.coordinate.context == 0:
                ids[mine] = torch.cat([torch.from_numpy(batch.sample_ids_B) for batch in micro_batches])
        dist.all_reduce(table)
        dist.all_reduce(ids)
        loss_B, correct_B, num_tokens_B = table.view(-1, 3).cpu().unbind(1)
        return RowScores(sample_ids_B=ids.view(-1).cpu(), loss_B=loss_B, correct_B=correct_B, num_tokens_B=num_tokens_B)

    @torch.inference_mode()
    def predict(self, micro_batches: Sequence[Batch], read: Callable[[Logits], T]) -> list[T]:
        """See `Engine.predict`."""
        assert not self._trains, "an engine that trains may hold no logits, and no whole weights"
        return self._look(micro_batches, partial(self._reading, read))

    def keep_outputs(self, layers: Collection[int]) -> Mapping[int, Sequence[Tensor]]:
        """See `Engine.keep_outputs`."""
        self._outputs |= keep_outputs(self._chunks, layers)
        return self._outputs

    @torch.no_grad()
    def observe(self, micro_batches: Sequence[Batch]) -> Importance:
        """See `Engine.observe`."""
        split = self._engine.sequence_parallel
        context = parallel_state.get_context_parallel_group()
        share = Share(
            tensor_rank=self.coordinate.tensor,
            context_rank=self.coordinate.context,
            experts=self._sharded.experts,
            sequence_group=parallel_state.get_tensor_and_context_parallel_group() if split else context,
            context_group=context,
            expert_tensor_group=parallel_state.get_expert_tensor_parallel_group(),
        )
        observer = Observer(self._model, self._sharded.device, share, num_micro_batches=len(micro_batches))
        with observer.watching(self._chunks):
            self._look(micro_batches, _nothing)
        return observer.importance(num_rows=len(micro_batches) * self._schedule.micro_batch * self.mesh.data)

    @torch.no_grad()
    def input_ranges(self, micro_batches: Sequence[Batch]) -> Channels:
        """See `Engine.input_ranges`."""
        observer = RangeObserver(self._model, self._sharded.device, tensor_rank=self.coordinate.tensor)
        with observer.watching(self._chunks):
            self._look(micro_batches, _nothing)
        return observer.ranges()

    def round_inputs(self, scheme: Scheme, kept_layers: Collection[int]) -> None:
        """See `Engine.round_inputs`."""
        for hook in self._rounding:
            hook.remove()
        self._rounding = list(round_inputs(self._chunks, self._sharded.tensor_group, scheme, kept_layers))

    def _look(self, micro_batches: Sequence[Batch], loss: LossOfOutput) -> list[Any]:
        for kept in self._outputs.values():
            kept.clear()
        with naming_memory_errors("a forward pass without gradients"):
            found = self._schedule.look(self._models, micro_batches, loss)
        for kept in self._outputs.values():
            del kept[len(micro_batches) :]
        return found

    def _row_scores(self, inputs: Inputs, hidden_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight_VD = self._sharded.head_weight if self._keeps_hidden else None
        rows_B3 = score_rows(hidden_BSD, weight_VD, inputs, self._sharded.tensor_group)
        return rows_B3[:, 0].sum().float(), rows_B3[:, 2].sum().int(), rows_B3

    def _reading(self, read: Callable[[Logits], Any], inputs: Inputs, hidden_BSD: Tensor) -> tuple[Tensor, Tensor, Any]:
        logits = Logits(hidden_BSD, self._sharded.head_weight, self._sharded.tensor_group)
        return _unused(hidden_BSD, read(logits))


def _nothing(inputs: Inputs, hidden_BSD: Tensor) -> tuple[Tensor, Tensor, None]:
    return _unused(hidden_BSD, None)


def _unused(hidden_BSD: Tensor, found: T) -> tuple[Tensor, Tensor, T]:
    # Schedules of forward passes want a loss and a count and use neither.
    nothing = hidden_BSD.new_zeros(())
    return nothing, nothing.int(), found
