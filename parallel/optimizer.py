"""Megatron's optimizers around our Adam: full parameters, or flat shards of them (the distributed optimizer).

Under both, and in both precisions, Adam works on float32 tensors that are a range of the elements of a model parameter;
`OptimizerShard` says which, and that is all that saving and loading needs to know.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from torch import Tensor

from conf.schema import EngineConfig, OptimConfig
from parallel import adam
from parallel.boxes import share_of_replica
from parallel.cpu import tensors_as_on_cuda
from parallel.outcome import Outcome


@dataclass(frozen=True, slots=True)
class OptimizerShard:
    """What Adam updates in one piece.

    Attributes:
        parameter: the model's parameter.
        start: first of the flattened parameter's elements that are in the shard.
        main: float32 values of those elements, of any shape; shares the parameter's memory in fp32.
        moments: Adam's state by name, shaped like `main`.
    """

    parameter: Tensor
    start: int
    main: Tensor
    moments: dict[str, Tensor]

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.main.numel()


@dataclass(frozen=True, slots=True)
class Family:
    """Weights that the same ranks hold equal copies of: all but the experts, or the experts.

    Attributes:
        is_expert: Megatron keeps gradients of the two in buffers of their own.
        parameters: those of this rank.
        group: the ranks that hold equal copies.
    """

    is_expert: bool
    parameters: list[torch.nn.Parameter]
    group: dist.ProcessGroup

    @property
    def replica(self) -> int:
        """Place among the ranks that hold equal copies."""
        return self.group.rank()

    def share(self, tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
        """Which elements [start, stop) of each tensor this rank should save, where others hold equal ones."""
        return share_of_replica([tensor.numel() for tensor in tensors], self.replica, self.group.size())


def families_of(parameters: Iterable[torch.nn.Parameter]) -> list[Family]:
    """Weights by which ranks hold equal copies of them: without expert groups there is one family."""
    kinds: dict[bool, list[torch.nn.Parameter]] = {False: [], True: []}
    for parameter in parameters:
        kinds[not getattr(parameter, "allreduce", True)].append(parameter)
    dense = parallel_state.get_data_parallel_group(with_context_parallel=True)
    families = [Family(False, kinds[False], dense)]
    if kinds[True]:
        families.append(Family(True, kinds[True], parallel_state.get_expert_data_parallel_group()))
    return families


class FamilyAdam(Protocol):
    """AdamW over one family of weights, whichever engine it belongs to.

    Attributes:
        distributed: each of the ranks that hold equal copies updates a part.
        masters_apart: what Adam updates is other memory than the model's parameters.
        family: what it updates.
    """

    distributed: bool
    masters_apart: bool
    family: Family

    def shards(self) -> Iterator[OptimizerShard]:
        """What this rank's Adam updates."""
        ...

    def zero_gradients(self) -> None:
        """Forget the gradients."""
        ...

    def gather_gradients(self) -> Tensor:
        """Take the reduced gradients; returns this rank's share of the sum of their squares, float64, shape ().

        What is held several times counts on one rank only.
        """
        ...

    def step(self, outcome: Outcome, *, learning_rate: float) -> None:
        """Divide the gradients and update, or leave everything as it is, and bring the parameters up to date."""
        ...

    def set_num_steps(self, num_steps: int) -> None:
        """Continue as after `num_steps` steps."""
        ...


class ShardedAdam:
    """Megatron's: AdamW over one family of weights of the wrapped (DDP) chunks of a model."""

    def __init__(self, chunks: Sequence[Any], family: Family, engine: EngineConfig, optim: OptimConfig) -> None:
        self.distributed = engine.zero_stage == 1
        self.masters_apart = engine.weight_precision == "bf16"
        self.family = family
        self.adam: torch.optim.AdamW = adam.make_adam(family.parameters, optim)
        config = OptimizerConfig(
            optimizer="adam",
            lr=optim.learning_rate,
            bf16=engine.weight_precision == "bf16",
            params_dtype=torch.bfloat16 if engine.weight_precision == "bf16" else torch.float32,
            use_distributed_optimizer=self.distributed,
            overlap_param_gather=self.distributed and engine.overlap,
        )
        with tensors_as_on_cuda():
            self.wrapper = self._wrap(chunks, config)
        self.wrapper.tp_group = parallel_state.get_tensor_model_parallel_group()
        adam.make_state(self.adam)

    def _wrap(self, chunks: Sequence[Any], config: OptimizerConfig) -> Any:
        if self.distributed:
            return DistributedOptimizer(
                self.adam,
                config,
                grad_scaler=None,
                init_state_fn=None,
                model_chunks=list(chunks),
                per_model_buffers={
                    index: chunk.expert_parallel_buffers if self.family.is_expert else chunk.buffers
                    for index, chunk in enumerate(chunks)
                },
                data_parallel_group=self.family.group,
                data_parallel_group_gloo=None,
                data_parallel_group_idx=0,
                distributed_optimizer_instance_id=0,
            )
        if config.bf16:
            return Float16OptimizerWithFloat16Params(self.adam, config, None, None)
        return FP32Optimizer(self.adam, config, None)

    def shards(self) -> Iterator[OptimizerShard]:
        """What this rank's Adam updates."""
        for parameter, start, main in self._mains():
            yield OptimizerShard(parameter, start, main, adam.moments_of(self.adam, main))

    def _mains(self) -> Iterator[tuple[Tensor, int, Tensor]]:
        wrapper = self.wrapper
        if self.distributed:
            models = [*wrapper.model_float16_groups, *wrapper.model_fp32_groups]
            mains = [*wrapper.shard_fp32_from_float16_groups, *wrapper.shard_fp32_groups]
            for parameter, main in _pairs(models, mains):
                yield parameter, wrapper._get_model_param_range_map(parameter)["param"].start, main
        elif isinstance(wrapper, Float16OptimizerWithFloat16Params):
            for parameter, main in _pairs(wrapper.float16_groups, wrapper.fp32_from_float16_groups):
                yield parameter, 0, main
        else:
            for parameter in adam.parameters_of(self.adam):
                yield parameter, 0, parameter

    def zero_gradients(self) -> None:
        """Forget the gradients."""
        self.wrapper.zero_grad()

    def gather_gradients(self) -> Tensor:
        """Take the reduced gradients from the model; returns this rank's share of the sum of their squares.

        What is held several times (over tensor ranks, by tied embeddings, or by replicas, which hold equal gradients
        unless the optimizer is distributed) counts on one rank only. Float64, shape ().
        """
        self.wrapper.prepare_grads()
        gradients = self.wrapper.get_main_grads_for_grad_norm()
        if not gradients or (self.family.replica > 0 and not self.distributed):
            return torch.zeros((), dtype=torch.float64)
        return torch.stack(torch._foreach_norm(gradients)).double().square().sum()

    def step(self, outcome: Outcome, *, learning_rate: float) -> None:
        """Divide the gradients and update, or leave everything as it is, and bring the model's parameters up to date.

        The kernel itself reads the divisor and whether to skip from the device.
        """
        adam.prepare_step(self.adam, divisor=outcome.divisor, skip=outcome.skip, learning_rate=learning_rate)
        self.wrapper.step_with_ready_grads()

    def set_num_steps(self, num_steps: int) -> None:
        """Continue as after `num_steps` steps."""
        adam.set_num_steps(self.adam, num_steps)


def _pairs(
    model_groups: Sequence[Sequence[Tensor]], main_groups: Sequence[Sequence[Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    for models, mains in zip(model_groups, main_groups, strict=True):
        yield from zip(models, mains, strict=True)
