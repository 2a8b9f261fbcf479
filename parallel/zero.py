"""DeepSpeed's optimizers around our Adam, at every ZeRO stage, behind the interface of `ShardedAdam`.

Under all of them Adam works on float32 tensors of which each model parameter has a run of elements (or all of them).
Where that run is, and where its gradient lies before a step, differs by stage: that is what the classes here know.

Gradients are means over data and context ranks; `gather_gradients` and `step` make sums of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import Tensor

from parallel import adam
from parallel.optimizer import Family, OptimizerShard
from parallel.outcome import Outcome


class GuardedAdam(torch.optim.AdamW):
    """AdamW that scales its gradients first, and for which a step can be called off.

    DeepSpeed steps once for each group of tensors and between two steps cleans up after the last; this is the one place
    that all of its ways to a step pass. Calling a step off lets it clean up with nothing changed.
    """

    gradient_scale = 1.0
    called_off = False
    mains_apart = False
    """Parameters are copies in the model's precision, and `main_of` is elsewhere."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Multiply the gradients by `gradient_scale` and update, or do nothing if called off."""
        assert closure is None
        if self.called_off:
            return
        gradients = [tensor.grad for tensor in adam.parameters_of(self) if tensor.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, self.gradient_scale)
        super().step()

    def make_state_of(self, flat: Tensor) -> None:
        """Make the state of a parameter, as after no steps."""
        adam.make_state_of(self, flat)

    def main_of(self, flat: Tensor) -> Tensor:
        """The float32 values of a parameter."""
        return flat.detach()


class ZeroAdam:
    """AdamW in a DeepSpeed engine; stage 0, in which every rank holds everything.

    Args:
        engine: DeepSpeed's, made with `inner` as its optimizer.
        inner: `GuardedAdam`, or one of its kind.
        family: the weights, and the ranks that hold equal copies of them (data x context ranks).
        counts: whether this rank counts a parameter in norms, among those that hold it.
    """

    distributed = False
    masters_apart = False

    def __init__(self, engine: Any, inner: GuardedAdam, family: Family, counts: Callable[[Any], bool]) -> None:
        self.engine = engine
        self.inner = inner
        self.family = family
        self.counts = counts
        self.pending = False  # there are gradients that no step has used up
        self._make_state()

    @property
    def wrapper(self) -> Any:
        """DeepSpeed's optimizer around ours."""
        return self.engine.optimizer

    def shards(self) -> Iterator[OptimizerShard]:
        """What this rank's Adam updates."""
        for parameter in adam.parameters_of(self.inner):
            yield OptimizerShard(parameter, 0, parameter, adam.moments_of(self.inner, parameter))

    def _make_state(self) -> None:
        for parameter in adam.parameters_of(self.inner):
            self.inner.make_state_of(parameter)

    def _gradients(self) -> Iterator[tuple[Any, Tensor]]:
        for parameter in adam.parameters_of(self.inner):
            if parameter.grad is not None:
                yield parameter, parameter.grad

    def zero_gradients(self) -> None:
        """Forget the gradients of a step that was refused."""
        if self.pending:
            self.inner.called_off = True
            self._step_engine()
            self.inner.called_off = False

    def gather_gradients(self) -> Tensor:
        """This rank's share of the sum of the squares of the summed gradients, float64, shape ().

        What is held several times (over tensor ranks, by tied embeddings, by replicas at stage 0) counts on one rank.
        """
        self.pending = True
        if self.family.replica > 0 and not self.distributed:
            return torch.zeros((), dtype=torch.float64)
        counted = [gradient for parameter, gradient in self._gradients() if self.counts(parameter)]
        if not counted:
            return torch.zeros((), dtype=torch.float64)
        norms = torch.stack(torch._foreach_norm([gradient.float() for gradient in counted]))
        return norms.double().square().sum() * self.family.group.size() ** 2

    def step(self, outcome: Outcome, *, learning_rate: float) -> None:
        """Divide the summed gradients, update, and bring the model's parameters up to date; or leave all as it is.

        Waits for the device: DeepSpeed's steps are steered from the host.
        """
        divisor, skip = torch.stack((outcome.divisor, outcome.skip)).tolist()
        if skip:
            return
        self.inner.gradient_scale = self.family.group.size() / divisor
        adam.set_learning_rate(self.inner, learning_rate)
        self._step_engine()

    def _step_engine(self) -> None:
        self.engine._take_model_step(None)
        self.pending = False

    def set_num_steps(self, num_steps: int) -> None:
        """Continue as after `num_steps` steps."""
        for state in self.inner.state.values():
            state["step"].fill_(num_steps)


class PartitionedAdam(ZeroAdam):
    """Stages 1 and 2: parameters are laid end to end, and each rank updates a range of that."""

    distributed = True
    masters_apart = True

    def shards(self) -> Iterator[OptimizerShard]:
        """What this rank's Adam updates."""
        for parameter, flat, place in self._places():
            local = place.lp_fragment_address
            main, moments = self.inner.main_of(flat), adam.moments_of(self.inner, flat)
            yield OptimizerShard(
                parameter,
                local.start,
                _narrow(main, place),
                {name: _narrow(moment, place) for name, moment in moments.items()},
            )

    def _make_state(self) -> None:
        super()._make_state()
        if self.inner.mains_apart:
            # A step leaves the updated values where DeepSpeed would round them to.
            flats = list(adam.parameters_of(self.inner))
            self.wrapper.param_buffer_of_bit16_for_cpu_offload_groups = [flat.detach() for flat in flats]
            for _, flat, place in self._places():
                place.hp_fragment = _narrow(flat, place)  # the one before would keep the first masters in memory

    def _places(self) -> Iterator[tuple[Any, Tensor, Any]]:
        for flat, parameters in zip(adam.parameters_of(self.inner), self._groups(), strict=True):
            for parameter in parameters:
                if parameter._hp_mapping is not None:
                    yield parameter, flat, parameter._hp_mapping

    def _groups(self) -> list[list[Any]]:
        groups: list[list[Any]] = self.wrapper.bit16_groups
        return groups

    def _gradients(self) -> Iterator[tuple[Any, Tensor]]:
        if self.wrapper.cpu_offload:
            for parameter, flat, place in self._places():
                assert flat.grad is not None
                yield parameter, _narrow(flat.grad, place)
            return
        for index, parameters in enumerate(self.wrapper.params_in_partition):
            gradients = [each for each in self.wrapper.averaged_gradients[index] if not _is_padding(each)]
            yield from zip(parameters, gradients, strict=False)  # a rank without parameters has a filler


class AccumulatedAdam(PartitionedAdam):
    """Stage 1 in bf16: as partitioned, with float32 gradients of all parameters on every rank."""

    def _groups(self) -> list[list[Any]]:
        groups: list[list[Any]] = self.wrapper.bf16_groups
        return groups

    def _gradients(self) -> Iterator[tuple[Any, Tensor]]:
        for parameters, gradients in zip(self._groups(), self.wrapper.fp32_groups_gradients, strict=True):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if parameter._hp_mapping is not None:
                    local = parameter._hp_mapping.lp_fragment_address
                    yield parameter, gradient.view(-1).narrow(0, local.start, local.numel)


class ScatteredAdam(ZeroAdam):
    """Stage 3: each rank holds a part of every parameter, and nothing else between its uses."""

    distributed = True
    masters_apart = True

    def shards(self) -> Iterator[OptimizerShard]:
        """What this rank's Adam updates."""
        for flat, parameters in self._groups():
            main, moments = self.inner.main_of(flat), adam.moments_of(self.inner, flat)
            offset = 0
            for parameter in parameters:
                start, stop = range_of(parameter)
                if start < stop:
                    yield OptimizerShard(
                        parameter,
                        start,
                        main.narrow(0, offset, stop - start),
                        {name: moment.narrow(0, offset, stop - start) for name, moment in moments.items()},
                    )
                offset += parameter.partition_numel()

    def _groups(self) -> Iterable[tuple[Tensor, list[Any]]]:
        return zip(self.wrapper.fp32_partitioned_groups_flat, self.wrapper.fp16_groups, strict=True)

    def _make_state(self) -> None:
        for flat, _ in self._groups():
            self.inner.make_state_of(flat)

    def _gradients(self) -> Iterator[tuple[Any, Tensor]]:
        for index, (flat, parameters) in enumerate(self._groups()):
            if self.wrapper.offload_optimizer:
                assert flat.grad is not None
                sizes = [parameter.partition_numel() for parameter in parameters]
                gradients = torch.split(flat.grad, sizes)
            else:
                gradients = self.wrapper.averaged_gradients[index]
            yield from zip(parameters, gradients, strict=True)


def let_go(model: torch.nn.Module) -> None:
    """Take a model that was trained at stage 3 from what DeepSpeed keeps in its modules, where nothing ever leaves.

    The root of every model stays on a stack of modules, and a cache on a method keeps modules; what engines that are
    still used had in it is found anew.
    """
    FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module is not model]
    method = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    (cached,) = (cell.cell_contents for cell in method.__closure__)  # within what marks it for profilers
    cached.cache_clear()


def kind_of(engine: Any) -> type[ZeroAdam]:
    """The class that knows the stage and precision of DeepSpeed's engine."""
    kinds = {
        "DeepSpeedZeroOptimizer": PartitionedAdam,
        "BF16_Optimizer": AccumulatedAdam,
        "DeepSpeedZeroOptimizer_Stage3": ScatteredAdam,
    }
    return kinds.get(type(engine.optimizer).__name__, ZeroAdam)


def range_of(parameter: Any) -> tuple[int, int]:
    """Which elements [start, stop) of a flattened parameter this rank holds at stage 3."""
    size = parameter.partition_numel()
    start = min(torch.distributed.get_rank(parameter.ds_process_group) * size, parameter.ds_numel)
    return start, min(start + size, parameter.ds_numel)


def _narrow(flat: Tensor, place: Any) -> Tensor:
    address = place.hp_fragment_address
    return flat.detach().view(-1).narrow(0, address.start, address.numel)


def _is_padding(gradient: Tensor) -> bool:
    return getattr(gradient, "_zero_padding", False)
