"""A training step: what both engines do around gradients and updates, agreed by all ranks at once.

How gradients are made and who updates is the backend's (`parallel/megatron.py`, `parallel/deepspeed.py`).
"""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from conf.schema import EngineConfig, ModelConfig, OptimConfig
from data.batch import Batch
from parallel import device
from parallel.engine import LossSums, Match, Objective, Piece, StepResult, TensorSource
from parallel.experts import METRICS, RouterTotals, routers_of
from parallel.forward_passes import ForwardPasses
from parallel.hidden_states import METRIC as HIDDEN_STATES
from parallel.hidden_states import Matching
from parallel.inputs import placed
from parallel.memory_errors import naming_memory_errors
from parallel.mesh import Mesh
from parallel.offload import offload_activations
from parallel.optimizer import FamilyAdam
from parallel.outcome import Outcome, begin_reading, result_of

# Of a bucket of gradients that is reduced at once: at most Megatron's default.
LARGEST_BUCKET = 40_000_000


class TrainingEngine(ForwardPasses, ABC):
    """See `Engine`. Without `optim` it only looks: nothing of the backend is used, and weights are whole."""

    _trains_without_logits: bool
    """In training the head is multiplied with together with the loss, as it always is in an engine that only looks."""

    def __init__(
        self, model: ModelConfig, engine: EngineConfig, optim: OptimConfig | None, mesh: Mesh, *, micro_batch: int
    ) -> None:
        keeps_hidden = optim is None or self._trains_without_logits
        super().__init__(model, engine, mesh, micro_batch=micro_batch, keeps_hidden=keeps_hidden)
        self._optim = optim
        self._routers = [router for chunk in self._chunks for router in routers_of(chunk)]
        self._totals = RouterTotals(self._sharded.device) if model.experts else None
        for router in self._routers:
            assert self._totals is not None
            router.totals = self._totals
        self._adams: list[FamilyAdam] = []
        self._matchings: list[Matching] = []
        if optim is None:
            for parameter in self._sharded.parameters:
                parameter.requires_grad_(False)
        else:
            self._trains = True
            if engine.offload_activations:
                offload_activations(self._chunks)
            self._models, self._adams = self._make_trainable(optim)

    @abstractmethod
    def _make_trainable(self, optim: OptimConfig) -> tuple[list[Any], list[FamilyAdam]]:
        """What the chunks are trained through, and an optimizer for each family of weights."""

    @abstractmethod
    def _accumulate(self, micro_batches: Sequence[Batch], objectives: Sequence[Objective]) -> list[LossSums]:
        """Gradients of the sum over micro-batches, reduced over data ranks; what the objective found, on the last."""

    def step(
        self,
        micro_batches: Sequence[Batch],
        objective: Objective | Sequence[Objective],
        *,
        learning_rate: float,
        stop: bool = False,
    ) -> StepResult:
        """See `Engine.step`."""
        assert self._optim is not None, "an engine without optim only scores"
        objectives = objective if isinstance(objective, Sequence) else [objective] * len(micro_batches)
        names = objectives[0].metric_names
        with naming_memory_errors("the forward and backward pass"):
            self._weigh_router_losses(micro_batches)
            for matching in self._matchings:
                matching.begin_step([self._placed(batch.loss_mask_BS) for batch in micro_batches])
            sums = self._accumulate(micro_batches, objectives)
        with naming_memory_errors("the gradient norm"):
            total = self._sum_over_world(sums, names, stop)
            outcome = Outcome.of(total, clip_grad_norm=self._optim.clip_grad_norm)
            read = begin_reading(outcome.report)
        with naming_memory_errors("the optimizer's update"):
            for adam in self._updated:
                adam.step(outcome, learning_rate=learning_rate)
        routers = () if self._totals is None else METRICS
        return result_of(read(), (*names, *routers, *(HIDDEN_STATES for _ in self._matchings)))

    def _sum_over_world(self, sums: Sequence[LossSums], names: Sequence[str], stop: bool) -> Tensor:
        """What `Outcome.of` wants, on the device; in the Megatron engine nothing here waits for it."""
        num_sums = 4 + len(names)
        further = [] if self._totals is None else [self._totals.in_tokens() / self._model.num_layers]
        further += [matching.sums for matching in self._matchings]
        total = torch.cat([torch.zeros(num_sums, device=self._sharded.device), *further]).double()
        for adam in self._updated:
            total[0] += adam.gather_gradients()
        for matching in self._matchings:
            total[2] += matching.loss
        total[1].fill_(float(stop))  # assigned, it would be a copy from the host, which waits
        if self._sharded.is_last and self.coordinate.tensor == 0:
            for part in sums:
                values = [part.loss, part.num_tokens, *(part.metrics[name] for name in names)]
                total[2:num_sums] += torch.stack([value.double() for value in values])
        dist.all_reduce(total)
        return total

    @property
    def _updated(self) -> list[FamilyAdam | Matching]:
        return [*self._adams, *self._matchings]

    def _weigh_router_losses(self, micro_batches: Sequence[Batch]) -> None:
        """Router losses are means over micro-batches, and gradients are divided by counted tokens: make up for it."""
        if self._totals is not None:
            counted = torch.zeros((), device=self._sharded.device)
            counted.fill_(float(sum(batch.loss_mask_BS.sum() for batch in micro_batches)))
            dist.all_reduce(counted, group=parallel_state.get_data_parallel_group())
            self._totals.begin_step(counted / (len(micro_batches) * self.mesh.data))

    def _placed(self, array: npt.NDArray[np.float32]) -> Tensor:
        return placed(array, self.mesh, self.coordinate, self._sharded.device)

    def match_outputs(self, match: Match) -> None:
        """See `Engine.match_outputs`."""
        assert self._optim is not None and not self._matchings, "an engine that trains, and once"
        split = self._engine.sequence_parallel
        width = self._model.hidden_size
        self._matchings.append(Matching(match, self._chunks, width=width, optim=self._optim, splits_sequence=split))

    def weights(self) -> Iterator[Piece]:
        """See `Engine.weights`."""
        return self._sharded.weights()

    def load_weights(self, source: TensorSource) -> None:
        """See `Engine.load_weights`."""
        self._sharded.load_weights(source, self._adams)

    def optimizer_state(self) -> Iterator[Piece]:
        """See `Engine.optimizer_state`."""
        assert self._adams, "an engine without optim has no optimizer"
        for adam in self._adams:
            yield from self._sharded.optimizer_state(adam, with_masters=self._saves_masters)
        for matching in self._matchings:
            yield from matching.pieces()

    def load_optimizer_state(self, source: TensorSource, *, num_steps: int) -> None:
        """See `Engine.load_optimizer_state`."""
        assert self._adams, "an engine without optim has no optimizer"
        for adam in self._adams:
            self._sharded.load_optimizer_state(source, adam, with_masters=self._saves_masters)
            adam.set_num_steps(num_steps)
        for matching in self._matchings:
            matching.load(source, num_steps=num_steps)

    @property
    def _saves_masters(self) -> bool:
        return self._engine.weight_precision == "bf16"

    def peak_memory_bytes(self) -> int:
        """See `Engine.peak_memory_bytes`."""
        return device.peak_memory_bytes()

    def close(self) -> None:
        """See `Engine.close`."""
        self._adams, self._routers, self._matchings, self._outputs = [], [], [], {}
        self._models, self._chunks = [], []
        self._sharded.let_go()
        RotaryEmbedding.forward.cache_clear()  # keeps the last models' rotary modules alive
        gc.collect()  # hooks and parameters refer to each other
        if self._sharded.device.type == "cuda":
            torch.cuda.empty_cache()


def detached(sums: LossSums) -> LossSums:
    """What is reported: pipeline schedules free the loss they are given, so it has its own hold of the value."""
    return replace(sums, loss=sums.loss.detach())
