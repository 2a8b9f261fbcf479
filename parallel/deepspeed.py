"""The DeepSpeed engine: ZeRO and DeepSpeed's pipeline around the same modules, behind the `Engine` protocol.

What DeepSpeed does in place of Megatron is everything about gradients and the optimizer, and the pipeline's schedule in
training.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe import p2p
from deepspeed.runtime.pipe.schedule import OptimizerStep, TrainSchedule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import logger
from megatron.core import parallel_state
from torch import Tensor

from conf.schema import EngineConfig, OptimConfig
from data.batch import Batch
from parallel import device, zero
from parallel.adam import make_adam
from parallel.cpu import adapt_deepspeed
from parallel.disk_adam import DiskAdam
from parallel.documents import Documents
from parallel.engine import LossSums, Objective, Piece, TensorSource
from parallel.inputs import Inputs
from parallel.mesh import Mesh
from parallel.optimizer import FamilyAdam
from parallel.state import pieces_of, read_range
from parallel.training import LARGEST_BUCKET, TrainingEngine, detached


class DeepSpeedEngine(TrainingEngine):
    """See `Engine`. Without an optimizer nothing of DeepSpeed is used, and weights are whole."""

    _trains_without_logits = False  # gradients are DeepSpeed's business, and at stage 3 weights are not whole
    _trainer: Any = None  # DeepSpeed's engine

    def _make_trainable(self, optim: OptimConfig) -> tuple[list[Any], list[FamilyAdam]]:
        adapt_deepspeed()
        logger.setLevel(logging.ERROR)  # it warns of optimizers that are not on its list
        # DeepSpeed keeps the groups of the first mesh it saw.
        deepspeed_groups._release_process_group_references()
        (chunk,), (family,) = self._chunks, self._sharded.families
        for parameter in chunk.parameters():
            if getattr(parameter, "sequence_parallel", False):
                parameter.register_hook(self._sum_over_tensor_ranks)
        inner = make_adam(chunk.parameters(), optim, self._kind_of_adam())
        in_stages = self.mesh.pipeline > 1
        self._shape_of_stages: torch.Size | None = None
        self._documents: deque[Documents | None] = deque()  # of the micro-batches that are still to come
        # DeepSpeed takes the GPU that this names; a rank that sees one GPU alone has number 0, whatever its place.
        os.environ["LOCAL_RANK"] = str(self._sharded.device.index or 0)
        deepspeed.init_distributed(device.communication_backend(), dist_init_required=False)
        self._trainer, *_ = deepspeed.initialize(
            model=_Pipeline(chunk, self.mesh, self._documents) if in_stages else chunk,
            optimizer=inner,
            mpu=None if in_stages else _Groups(),
            config=deepspeed_config(self._engine, self.mesh, self._schedule.micro_batch, chunk),
            dist_init_required=False,
        )
        logger.setLevel(logging.WARNING)
        kind = zero.kind_of(self._trainer)
        return self._chunks, [kind(self._trainer, inner, family, self._sharded.saves)]

    def _kind_of_adam(self) -> Callable[..., zero.GuardedAdam]:
        directory = self._engine.offload_directory
        if self._engine.offload_optimizer != "nvme":
            return zero.GuardedAdam
        assert directory is not None, "a rule asks for it"
        dtype = torch.bfloat16 if self._engine.weight_precision == "bf16" else torch.float32
        return partial(DiskAdam, directory=Path(directory).expanduser(), dtype=dtype)

    def _sum_over_tensor_ranks(self, gradient: Tensor) -> Tensor:
        # Each tensor rank has seen its part of the sequence only.
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=self._sharded.tensor_group)
        return gradient

    def _accumulate(self, micro_batches: Sequence[Batch], objectives: Sequence[Objective]) -> list[LossSums]:
        for adam in self._adams:
            adam.zero_gradients()
        inputs = self._schedule.inputs(micro_batches)
        questions = [_Question(*pair) for pair in zip(inputs, objectives, strict=True)]
        sums: list[LossSums] = []

        def loss(logits_BSV: Tensor, asked: _Question) -> Tensor:
            given = asked.inputs
            found = asked.objective(logits_BSV, given.labels_BS, given.loss_mask_BS, self._sharded.tensor_group)
            sums.append(detached(found))
            return found.loss

        if self.mesh.pipeline > 1:
            self._accumulate_in_stages(questions, loss)
            return sums
        self._trainer.train()
        for index, asked in enumerate(questions):
            self._trainer.set_gradient_accumulation_boundary(index == len(questions) - 1)
            logits_BSV = asked.inputs.through(self._trainer)
            self._trainer.backward(loss(logits_BSV, asked), scale_wrt_gas=False)
        return sums

    def _accumulate_in_stages(self, questions: Sequence[_Question], loss: Any) -> None:
        trainer = self._trainer
        trainer.module.train()
        trainer.module.loss_fn = loss
        trainer._compute_loss, trainer.total_loss = True, None
        shape = questions[0].inputs.tokens_BS.shape
        if shape != self._shape_of_stages:
            trainer.reset_activation_shape()
            self._shape_of_stages = shape
        self._documents.clear()
        self._documents.extend(asked.inputs.documents for asked in questions)
        trainer.set_dataiterator(
            iter([((asked.inputs.tokens_BS, asked.inputs.position_ids_BS), asked) for asked in questions])
        )
        schedule = _WithoutUpdate(
            micro_batches=len(questions), stages=self.mesh.pipeline, stage_id=self.coordinate.pipeline
        )
        trainer._exec_schedule(schedule)

    def weights(self) -> Iterator[Piece]:
        """See `Engine.weights`."""
        if not self._adams or self._engine.zero_stage < 3:
            yield from super().weights()
            return
        for parameter, boxes in self._sharded.parameters.items():
            if self._sharded.saves(parameter):
                start, stop = zero.range_of(parameter)
                yield from pieces_of(_part_of(parameter)[: stop - start], boxes, start)

    @torch.no_grad()
    def load_weights(self, source: TensorSource) -> None:
        """See `Engine.load_weights`."""
        if not self._adams or self._engine.zero_stage < 3:
            super().load_weights(source)
            return
        (adam,) = self._adams
        for shard in adam.shards():
            values = read_range(source, self._sharded.parameters[shard.parameter], shard.start, shard.stop)
            shard.main.copy_(values)
            _part_of(shard.parameter)[: values.numel()].copy_(values)
        kept_whole = self._trainer.optimizer.persistent_parameters
        if kept_whole:
            kept_whole[0].all_gather(kept_whole)

    def close(self) -> None:
        """See `Engine.close`."""
        if self._trainer is not None:
            self._trainer.destroy()
            if p2p._grid is getattr(self._trainer, "grid", None):
                # Module globals that would keep the pipeline's groups.
                p2p._grid = p2p._groups = None
            self._trainer = None
            zero.let_go(self._chunks[0])
        super().close()


def deepspeed_config(engine: EngineConfig, mesh: Mesh, micro_batch: int, chunk: Any) -> dict[str, Any]:
    """What `deepspeed.initialize` is told."""
    sizes = [parameter.numel() for parameter in chunk.parameters()]
    bucket = max(min(LARGEST_BUCKET, sum(sizes)), max(sizes))
    norm = max(parameter.numel() for parameter in chunk.parameters() if parameter.dim() == 1)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        # Of which the engine has as many in a step as it is given.
        "gradient_accumulation_steps": 1,
        "train_batch_size": micro_batch * mesh.num_replicas,
        # Left out, it is 1.0; the engine clips, with the norm that it reports.
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU in every micro-batch
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        "zero_optimization": {
            "stage": engine.zero_stage,
            "overlap_comm": engine.overlap,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket + bucket % 2,
            "stage3_prefetch_bucket_size": bucket,
            # Norms stay whole; gathering them costs more than keeping them.
            "stage3_param_persistence_threshold": norm + 1,
        },
    }
    if engine.weight_precision == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if engine.offload_optimizer != "none":
        # Not its "nvme": see `DiskAdam`, which has host memory give way to a file.
        config["zero_optimization"]["offload_optimizer"] = {
            "device": "cpu",
            "pin_memory": torch.cuda.is_available(),
        }
    return config


@dataclass(frozen=True, slots=True)
class _Question:
    """What the loss of a micro-batch is made of besides logits; DeepSpeed hands it through as the labels."""

    inputs: Inputs
    objective: Objective


class _Groups:
    """Megatron's groups as DeepSpeed asks for them ("mpu"): ranks of a data or context axis reduce gradients."""

    def get_model_parallel_group(self) -> Any:
        return parallel_state.get_tensor_model_parallel_group()

    def get_model_parallel_rank(self) -> int:
        return int(parallel_state.get_tensor_model_parallel_rank())

    def get_model_parallel_world_size(self) -> int:
        return int(parallel_state.get_tensor_model_parallel_world_size())

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_group(self) -> Any:
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_rank(self) -> int:
        return int(parallel_state.get_data_parallel_rank(with_context_parallel=True))

    def get_data_parallel_world_size(self) -> int:
        return int(parallel_state.get_data_parallel_world_size(with_context_parallel=True))


class _Stage(torch.nn.Module):
    """A pipeline rank's chunk as the one layer that DeepSpeed sees of it.

    DeepSpeed gives the batch to the first and last stages only, and calls each stage once a micro-batch, in order.
    """

    def __init__(self, chunk: Any, documents: deque[Documents | None]) -> None:
        super().__init__()
        self.chunk = chunk
        self.documents = documents

    def forward(self, given: Any) -> Tensor:
        tokens_BS, position_ids_BS = given if self.chunk.pre_process else (None, None)
        if not self.chunk.pre_process:
            self.chunk.set_input_tensor(given)
        documents = self.documents.popleft()
        return cast(Tensor, self.chunk(tokens_BS, position_ids_BS, None, packed_seq_params=documents))


class _Pipeline(PipelineModule):  # type: ignore[misc]
    """As many layers as pipeline ranks; those of other ranks are placeholders."""

    def __init__(self, chunk: Any, mesh: Mesh, documents: deque[Documents | None]) -> None:
        stage = mesh.coordinate(dist.get_rank()).pipeline
        layers = [_Stage(chunk, documents) if index == stage else torch.nn.Identity() for index in range(mesh.pipeline)]
        topology = PipeModelDataParallelTopology(num_pp=mesh.pipeline, num_dp=mesh.num_replicas, num_mp=mesh.tensor)
        super().__init__(layers, topology=topology, partition_method="uniform")
        is_end = stage in (0, mesh.pipeline - 1)
        self.tied = [chunk] if chunk.share_embeddings_and_output_weights and is_end else []

    def get_tied_weights_and_groups(self) -> list[tuple[Tensor, Any]]:
        """Weights whose gradients are summed with those of another pipeline rank."""
        return [
            (chunk.shared_embedding_or_output_weight(), parallel_state.get_embedding_group()) for chunk in self.tied
        ]


class _WithoutUpdate(TrainSchedule):  # type: ignore[misc]
    """DeepSpeed's schedule up to reduced gradients: whether to step is agreed on first."""

    def steps(self) -> Iterator[list[Any]]:
        for commands in super().steps():
            yield [command for command in commands if not isinstance(command, OptimizerStep)]


def _part_of(parameter: Any) -> Tensor:
    """What this rank holds of a parameter at stage 3, flat, with padding."""
    return cast(Tensor, parameter.ds_tensor.detach().view(-1))


__all__ = ["DeepSpeedEngine", "deepspeed_config"]
