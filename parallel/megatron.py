"""The Megatron-core engine: its schedules, DDP and optimizers behind the `Engine` protocol."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from conf.schema import EngineConfig, ModelConfig, OptimConfig, Scheme
from data.batch import Batch
from parallel import device, weight_names
from parallel.boxes import Box
from parallel.compilation import compile_layers, gather_whole_layers
from parallel.cpu import adapt_megatron, tensors_as_on_cuda
from parallel.engine import Logits, LossSums, Match, Objective, Piece, RowScores, StepResult, TensorSource
from parallel.experts import METRICS, RouterTotals, routers_of
from parallel.groups import megatron_coordinate
from parallel.head import keep_hidden, loss_of_hidden, score_rows
from parallel.hidden_states import METRIC as HIDDEN_STATES
from parallel.hidden_states import Matching, keep_outputs
from parallel.importance import Importance, Observer, Share
from parallel.inputs import Inputs, inputs_of_rank, placed
from parallel.linear import SCALING, use_own_products
from parallel.memory_errors import naming_memory_errors
from parallel.mesh import Mesh
from parallel.model import build_chunks, first_layer_of
from parallel.offload import offload_activations
from parallel.optimizer import OptimizerShard, ShardedAdam, families_of
from parallel.outcome import Outcome, begin_reading, result_of
from parallel.quantisation import round_inputs
from parallel.ranges import Channels, RangeObserver
from parallel.state import pieces_of, read_range

T = TypeVar("T")
MASTER = "master/"
# At most Megatron's default; at least so many buckets a chunk that a reduction can overlap with computation.
LARGEST_BUCKET = 40_000_000
BUCKETS_TO_OVERLAP = 8


class MegatronEngine:
    """See `Engine`. Megatron's groups must be those of the mesh (`groups.enter_mesh`) as long as the engine is used."""

    _trains_without_logits = True
    """In training the head is multiplied with together with the loss, as it always is in an engine that only looks."""

    def __init__(
        self, model: ModelConfig, engine: EngineConfig, optim: OptimConfig | None, mesh: Mesh, *, micro_batch: int
    ) -> None:
        adapt_megatron()
        self.mesh = mesh
        self.coordinate = mesh.coordinate(dist.get_rank())
        assert self.coordinate == megatron_coordinate(), "Megatron's groups are of another mesh"
        self.num_parameters = weight_names.num_parameters(model)
        self._model = model
        self._engine = engine
        self._optim = optim
        self._micro_batch = micro_batch
        self._device = device.this_device()
        self._tensor_group: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
        self._is_last = self.coordinate.pipeline == mesh.pipeline - 1
        self._keeps_hidden = optim is None or self._trains_without_logits
        with tensors_as_on_cuda():
            self._chunks = build_chunks(model, engine, mesh)
        self._experts = weight_names.experts_of_rank(model, mesh.expert_rank(self.coordinate), mesh.expert)
        self._parameters = dict(self._named_boxes(model))
        if self._is_last and self._keeps_hidden:
            keep_hidden(self._chunks[-1])
        self._families = families_of(parameter for chunk in self._chunks for parameter in chunk.parameters())
        self._num_layers = model.num_layers
        self._routers = [router for chunk in self._chunks for router in routers_of(chunk)]
        self._totals = RouterTotals(self._device) if model.experts else None
        for router in self._routers:
            assert self._totals is not None
            router.totals = self._totals
        if engine.compile:
            compile_layers(self._chunks)
        self._models: list[Any] = self._chunks
        self._adams: list[Any] = []
        self._outputs: dict[int, list[Tensor]] = {}
        self._matchings: list[Matching] = []
        self._accumulating: list[Any] = []
        """Weights whose gradients are added to `main_grad` where they are computed, not by Megatron's hooks."""
        self._rounding: list[Any] = []
        """Hooks of `round_inputs`."""
        if optim is None:
            for parameter in self._parameters:
                parameter.requires_grad_(False)
        else:
            if engine.offload_activations:
                offload_activations(self._chunks)
            self._models, self._adams = self._make_trainable(optim)

    def _named_boxes(self, model: ModelConfig) -> Iterator[tuple[Tensor, tuple[Box, ...]]]:
        for chunk in self._chunks:
            for name, parameter in chunk.named_parameters():
                boxes = weight_names.boxes_of_parameter(
                    model,
                    name,
                    first_layer=first_layer_of(chunk),
                    tensor_rank=self.coordinate.tensor,
                    tensor_size=self.mesh.tensor,
                    experts=self._experts,
                )
                assert sum(box.num_elements for box in boxes) == parameter.numel(), name
                # Megatron marks what is sliced over tensor ranks only where it initialises weights itself; unmarked
                # parameters would count once in the gradient norm instead of once a tensor rank.
                parameter.tensor_model_parallel = boxes[0].shape != boxes[0].global_shape
                yield parameter, boxes

    def _make_trainable(self, optim: OptimConfig) -> tuple[list[Any], list[Any]]:
        """What the chunks are trained through, and an optimizer for each family of weights (see `ShardedAdam`)."""
        models = self._wrap_chunks()
        self._accumulating = self._accumulate_in_products()
        if self._engine.compile:
            for wrapped in models:
                gather_whole_layers(wrapped)
        return models, [ShardedAdam(models, family, self._engine, optim) for family in self._families]

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
        if self._is_last:
            # Of tied weights the embedding gives a gradient by itself, which the hooks must add.
            chunk = self._chunks[-1]
            is_tied = chunk.pre_process and chunk.share_embeddings_and_output_weights
            weights += [] if is_tied else [self._head_weight()]
        return weights

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
            for adam in (*self._adams, *self._matchings):
                adam.step(outcome, learning_rate=learning_rate)
        routers = () if self._totals is None else METRICS
        return result_of(read(), (*names, *routers, *(HIDDEN_STATES for _ in self._matchings)))

    def _sum_over_world(self, sums: Sequence[LossSums], names: Sequence[str], stop: bool) -> Tensor:
        """What `Outcome.of` wants, on the device; in the Megatron engine nothing here waits for it."""
        num_sums = 4 + len(names)
        further = [] if self._totals is None else [self._totals.in_tokens() / self._num_layers]
        further += [matching.sums for matching in self._matchings]
        total = torch.cat([torch.zeros(num_sums, device=self._device), *further]).double()
        for adam in (*self._adams, *self._matchings):
            total[0] += adam.gather_gradients()
        for matching in self._matchings:
            total[2] += matching.loss
        total[1] = float(stop)
        if self._is_last and self.coordinate.tensor == 0:
            for part in sums:
                values = [part.loss, part.num_tokens, *(part.metrics[name] for name in names)]
                total[2:num_sums] += torch.stack([value.double() for value in values])
        dist.all_reduce(total)
        return total

    def _accumulate(self, micro_batches: Sequence[Batch], objectives: Sequence[Objective]) -> list[LossSums]:
        """Gradients of the sum over micro-batches, reduced over data ranks; what the objective found, on the last."""
        for model in self._models:
            model.zero_grad_buffer()
        for weight in self._accumulating:
            weight.grad_added_to_main_grad = True
        for adam in self._adams:
            adam.zero_gradients()
        return self._run(micro_batches, [partial(self._training_loss, each) for each in objectives])

    def _weigh_router_losses(self, micro_batches: Sequence[Batch]) -> None:
        """Router losses are means over micro-batches, and gradients are divided by counted tokens: make up for it."""
        if self._totals is not None:
            counted = torch.tensor(float(sum(batch.loss_mask_BS.sum() for batch in micro_batches)), device=self._device)
            dist.all_reduce(counted, group=parallel_state.get_data_parallel_group())
            self._totals.begin_step(counted / (len(micro_batches) * self.mesh.data))

    @torch.no_grad()
    def score(self, micro_batches: Sequence[Batch]) -> RowScores:
        """See `Engine.score`."""
        rows: list[Tensor] = self._look(micro_batches, self._row_scores)
        num_rows = len(micro_batches) * self._micro_batch
        table = torch.zeros(self.mesh.data, num_rows, 3, dtype=torch.float64, device=self._device)
        ids = torch.zeros(self.mesh.data, num_rows, dtype=torch.int64, device=self._device)
        mine = self.coordinate.data
        if self._is_last and self.coordinate.tensor == 0:
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
        assert self._optim is None, "an engine that trains may hold no logits, and no whole weights"
        return self._look(micro_batches, partial(self._reading, read))

    def keep_outputs(self, layers: Collection[int]) -> Mapping[int, Sequence[Tensor]]:
        """See `Engine.keep_outputs`."""
        self._outputs |= keep_outputs(self._chunks, layers)
        return self._outputs

    def match_outputs(self, match: Match) -> None:
        """See `Engine.match_outputs`."""
        assert self._optim is not None and not self._matchings, "an engine that trains, and once"
        split = self._engine.sequence_parallel
        width = self._model.hidden_size
        self._matchings.append(Matching(match, self._chunks, width=width, optim=self._optim, splits_sequence=split))

    @torch.no_grad()
    def observe(self, micro_batches: Sequence[Batch]) -> Importance:
        """See `Engine.observe`."""
        split = self._engine.sequence_parallel
        context = parallel_state.get_context_parallel_group()
        share = Share(
            tensor_rank=self.coordinate.tensor,
            context_rank=self.coordinate.context,
            experts=self._experts,
            sequence_group=parallel_state.get_tensor_and_context_parallel_group() if split else context,
            context_group=context,
            expert_tensor_group=parallel_state.get_expert_tensor_parallel_group(),
        )
        observer = Observer(self._model, self._device, share, num_micro_batches=len(micro_batches))
        with observer.watching(self._chunks):
            self._look(micro_batches, _nothing)
        return observer.importance(num_rows=len(micro_batches) * self._micro_batch * self.mesh.data)

    @torch.no_grad()
    def input_ranges(self, micro_batches: Sequence[Batch]) -> Channels:
        """See `Engine.input_ranges`."""
        observer = RangeObserver(self._model, self._device, tensor_rank=self.coordinate.tensor)
        with observer.watching(self._chunks):
            self._look(micro_batches, _nothing)
        return observer.ranges()

    def round_inputs(self, scheme: Scheme, kept_layers: Collection[int]) -> None:
        """See `Engine.round_inputs`."""
        for hook in self._rounding:
            hook.remove()
        self._rounding = list(round_inputs(self._chunks, self._tensor_group, scheme, kept_layers))

    def _look(self, micro_batches: Sequence[Batch], loss: Callable[[Inputs, Tensor], Any]) -> list[Any]:
        """Forward passes only, without activation recomputation; returns as `_run`."""
        for model in self._models:
            model.eval()
        for kept in self._outputs.values():
            kept.clear()
        # The interleaved schedule takes multiples of the pipeline size; what is added is dropped again.
        virtual = self._engine.mesh.virtual_pipeline > 1
        padding = -len(micro_batches) % self.mesh.pipeline if virtual else 0
        padded = [*micro_batches, *list(micro_batches[-1:]) * padding]
        found = self._run(padded, [loss] * len(padded), forward_only=True)
        for model in self._models:
            model.train()
        for kept in self._outputs.values():
            del kept[len(micro_batches) :]
        return found[: len(micro_batches)]

    def _run(
        self,
        micro_batches: Sequence[Batch],
        losses: Sequence[Callable[[Inputs, Tensor], Any]],
        *,
        forward_only: bool = False,
    ) -> list[Any]:
        """Put micro-batches through Megatron's schedule.

        Returns:
            On the last pipeline rank what each loss returned third for its micro-batch; else nothing.
        """
        self._check_shapes(micro_batches)
        inputs = [inputs_of_rank(batch, self.mesh, self.coordinate, self._device) for batch in micro_batches]
        pairs = list(zip(inputs, losses, strict=True))
        virtual = self._engine.mesh.virtual_pipeline

        def forward(iterator: Iterator[Any], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
            given, loss = next(iterator)
            return given.through(model), partial(loss, given)

        schedule = get_forward_backward_func(self.mesh.pipeline, virtual if virtual > 1 else None)
        outputs: list[Any] = schedule(
            forward_step_func=forward,
            data_iterator=[iter(pairs) for _ in range(virtual)],
            model=self._models,
            num_microbatches=len(inputs),
            seq_length=micro_batches[0].tokens_BS.shape[1],
            micro_batch_size=self._micro_batch,
            forward_only=forward_only,
        )
        return outputs

    def _training_loss(
        self, objective: Objective, inputs: Inputs, hidden_BSD: Tensor
    ) -> tuple[Tensor, Tensor, LossSums]:
        sums = loss_of_hidden(objective, hidden_BSD, self._head_weight(), inputs, self._tensor_group)
        return sums.loss, sums.num_tokens.int(), detached(sums)

    def _row_scores(self, inputs: Inputs, hidden_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight_VD = self._head_weight() if self._keeps_hidden else None
        rows_B3 = score_rows(hidden_BSD, weight_VD, inputs, self._tensor_group)
        return rows_B3[:, 0].sum().float(), rows_B3[:, 2].sum().int(), rows_B3

    def _reading(self, read: Callable[[Logits], Any], inputs: Inputs, hidden_BSD: Tensor) -> tuple[Tensor, Tensor, Any]:
        return _unused(hidden_BSD, read(Logits(hidden_BSD, self._head_weight(), self._tensor_group)))

    def _head_weight(self) -> Tensor:
        chunk = self._chunks[-1]
        is_tied = chunk.share_embeddings_and_output_weights
        return cast(Tensor, chunk.shared_embedding_or_output_weight() if is_tied else chunk.output_layer.weight)

    def _placed(self, array: npt.NDArray[np.float32]) -> Tensor:
        return placed(array, self.mesh, self.coordinate, self._device)

    def _check_shapes(self, micro_batches: Sequence[Batch]) -> None:
        shapes = {batch.tokens_BS.shape for batch in micro_batches}
        if len(shapes) != 1:
            raise ValueError(f"micro-batches of a step have one shape, and there is at least one; got {sorted(shapes)}")
        num_rows, num_tokens = shapes.pop()
        if num_rows != self._micro_batch:
            raise ValueError(f"micro-batches have {num_rows} rows; this engine was made for {self._micro_batch}")
        parts = (2 * self.mesh.context if self.mesh.context > 1 else 1) * (
            self.mesh.tensor if self._engine.sequence_parallel else 1
        )
        if num_tokens % parts:
            raise ValueError(f"rows have {num_tokens} tokens, which must be a multiple of {parts} ({self.mesh})")

    def weights(self) -> Iterator[Piece]:
        """See `Engine.weights`."""
        if self._adams and self._engine.zero_stage == 1 and self._engine.overlap:
            # The updated shards would be gathered only in the next forward pass.
            for model in self._models:
                model.start_param_sync(force_sync=True)
        return self._weight_pieces()

    def _weight_pieces(self) -> Iterator[Piece]:
        for family in self._families:
            saved = [parameter for parameter in family.parameters if self._saves(parameter)]
            for parameter, (start, stop) in zip(saved, family.share(saved), strict=True):
                yield from pieces_of(parameter.detach().view(-1)[start:stop], self._parameters[parameter], start)

    @torch.no_grad()
    def load_weights(self, source: TensorSource) -> None:
        """See `Engine.load_weights`."""
        shards = {shard.parameter: shard for adam in self._adams if adam.masters_apart for shard in adam.shards()}
        for parameter, boxes in self._parameters.items():
            values = read_range(source, boxes, 0, parameter.numel())
            parameter.copy_(values.view_as(parameter))
            if parameter in shards:
                shard = shards[parameter]
                shard.main.copy_(values[shard.start : shard.stop].view_as(shard.main))

    def optimizer_state(self) -> Iterator[Piece]:
        """See `Engine.optimizer_state`."""
        assert self._adams, "an engine without optim has no optimizer"
        for adam in self._adams:
            shards = [shard for shard in adam.shards() if self._saves(shard.parameter)]
            if adam.distributed:
                ranges = [(0, shard.main.numel()) for shard in shards]
            else:
                ranges = adam.family.share([shard.main for shard in shards])
            for shard, (start, stop) in zip(shards, ranges, strict=True):
                for prefix, values in self._state_of(shard):
                    part = values.detach().view(-1)[start:stop]
                    yield from pieces_of(part, self._parameters[shard.parameter], shard.start + start, prefix=prefix)
        for matching in self._matchings:
            yield from matching.pieces()

    @torch.no_grad()
    def load_optimizer_state(self, source: TensorSource, *, num_steps: int) -> None:
        """See `Engine.load_optimizer_state`."""
        assert self._adams, "an engine without optim has no optimizer"
        for adam in self._adams:
            for shard in adam.shards():
                for prefix, values in self._state_of(shard):
                    flat = read_range(source, self._parameters[shard.parameter], shard.start, shard.stop, prefix=prefix)
                    values.copy_(flat.view_as(values))
            adam.set_num_steps(num_steps)
        for matching in self._matchings:
            matching.load(source, num_steps=num_steps)

    def _state_of(self, shard: OptimizerShard) -> list[tuple[str, Tensor]]:
        """What a resume needs of a shard besides the weights, by prefix of its canonical name."""
        state = [(f"{name}/", moment) for name, moment in shard.moments.items()]
        return [*state, (MASTER, shard.main)] if self._engine.weight_precision == "bf16" else state

    def _saves(self, parameter: Any) -> bool:
        """Whether this rank is among those that save a parameter which others hold as well."""
        is_tied_copy = getattr(parameter, "shared", False)
        return not is_tied_copy and (parameter.tensor_model_parallel or self.coordinate.tensor == 0)

    def peak_memory_bytes(self) -> int:
        """See `Engine.peak_memory_bytes`."""
        return device.peak_memory_bytes()

    def close(self) -> None:
        """See `Engine.close`."""
        self._adams, self._families, self._routers, self._matchings, self._outputs = [], [], [], [], {}
        self._models, self._chunks, self._parameters, self._accumulating = [], [], {}, []
        RotaryEmbedding.forward.cache_clear()  # keeps the last models' rotary modules alive
        gc.collect()  # hooks and parameters refer to each other
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _reduce_gradients(models: Sequence[Any], num_tokens: Tensor | None, **options: Any) -> None:
    # Without the count: the engine divides by the global count when it has it, in one pass with clipping.
    finalize_model_grads(models, None, **options)


def detached(sums: LossSums) -> LossSums:
    """What is reported: pipeline schedules free the loss they are given, so it has its own hold of the value."""
    return replace(sums, loss=sums.loss.detach())


def _nothing(inputs: Inputs, hidden_BSD: Tensor) -> tuple[Tensor, Tensor, None]:
    return _unused(hidden_BSD, None)


def _unused(hidden_BSD: Tensor, found: T) -> tuple[Tensor, Tensor, T]:
    # Schedules of forward passes want a loss and a count and use neither.
    nothing = hidden_BSD.new_zeros(())
    return nothing, nothing.int(), found
