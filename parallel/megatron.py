"""The Megatron-core engine: its schedules, DDP and optimizers behind the `Engine` protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from torch import Tensor

from conf.schema import OptimConfig
from data.batch import Batch
from parallel.compilation import gather_whole_layers
from parallel.engine import LossSums, Objective, Piece
from parallel.head import loss_of_hidden
from parallel.inputs import Inputs
from parallel.linear import SCALING, use_own_products
from parallel.optimizer import FamilyAdam, ShardedAdam
from parallel.training import LARGEST_BUCKET, TrainingEngine, detached

# At least so many buckets a chunk that a reduction can overlap with computation.
BUCKETS_TO_OVERLAP = 8


class MegatronEngine(TrainingEngine):
    """See `Engine`. Megatron's groups must be those of the mesh (`groups.enter_mesh`) as long as the engine is used."""

    _trains_without_logits = True

    def _make_trainable(self, optim: OptimConfig) -> tuple[list[Any], list[FamilyAdam]]:
        models = self._wrap_chunks()
        self._accumulating = self._accumulate_in_products()
        """Weights whose gradients are added to `main_grad` where they are computed, not by Megatron's hooks."""
        if self._engine.compile:
            for wrapped in models:
                gather_whole_layers(wrapped)
        return models, [ShardedAdam(models, family, self._engine, optim) for family in self._sharded.families]

    def _wrap_chunks(self) -> list[Any]:
        engine = self._engine
        config = self._chunks[0].config
        num_elements = max(sum(parameter.numel() for parameter in chunk.parameters()) for chunk in self._chunks)
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=engine.overlap,
            overlap_param_gather=engine.overlap and engine.zero_stage == 1,
            use_distributed_optimizer=engine.zero_stage == 1,
            bucket_size=min(LARGEST_BUCKET, -(-num_elements // BUCKETS_TO_OVERLAP)),
        )
        models = [
            DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(self._chunks)
        ]
        config.finalize_model_grads_func = _reduce_gradients
        if engine.overlap:
            no_sync = [model.no_sync for model in models]
            config.no_sync_func = no_sync if len(models) > 1 else no_sync[0]
        return models

    def _accumulate_in_products(self) -> list[Any]:
        weights: list[Any] = use_own_products(self._chunks, SCALING.get(self._engine.precision))
        if self._sharded.is_last:
            # Of tied weights the embedding gives a gradient by itself, which the hooks must add.
            chunk = self._chunks[-1]
            is_tied = chunk.pre_process and self._sharded.is_tied
            weights += [] if is_tied else [self._sharded.head_weight]
        return weights

    def _accumulate(self, micro_batches: Sequence[Batch], objectives: Sequence[Objective]) -> list[LossSums]:
        for model in self._models:
            model.zero_grad_buffer()
        for weight in self._accumulating:
            weight.grad_added_to_main_grad = True
        for adam in self._adams:
            adam.zero_gradients()
        losses = [partial(self._training_loss, each) for each in objectives]
        return self._schedule.run(self._models, micro_batches, losses)

    def _training_loss(
        self, objective: Objective, inputs: Inputs, hidden_BSD: Tensor
    ) -> tuple[Tensor, Tensor, LossSums]:
        sharded = self._sharded
        sums = loss_of_hidden(objective, hidden_BSD, sharded.head_weight, inputs, sharded.tensor_group)
        return sums.loss, sums.num_tokens.int(), detached(sums)

    def weights(self) -> Iterator[Piece]:
        """See `Engine.weights`."""
        if self._adams and self._engine.zero_stage == 1 and self._engine.overlap:
            # The updated shards would be gathered only in the next forward pass.
            for model in self._models:
                model.start_param_sync(force_sync=True)
        return super().weights()

    def close(self) -> None:
        """See `Engine.close`."""
        self._accumulating = []
        super().close()


def _reduce_gradients(models: Sequence[Any], num_tokens: Tensor | None, **options: Any) -> None:
    # Without the count: the engine divides by the global count when it has it, in one pass with clipping.
    finalize_model_grads(models, None, **options)
