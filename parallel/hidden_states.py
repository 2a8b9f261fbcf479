"""Hidden states as a further thing to learn from a teacher: outputs of a student's layers are held against its.

A forward hook of a layer computes the distance and its gradient, and puts that into the layer's output's own gradient;
so it works under every schedule of either engine, with layers that are compiled or recomputed too, and keeps nothing.
Where widths differ, a projection is trained with the student. Every rank of a pipeline stage holds all of it; it goes
into the optimizer's part of a checkpoint, never into the model.

Shape suffixes: S tokens on this rank, B rows, D the student's width, T the teacher's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from conf.schema import OptimConfig
from parallel import adam
from parallel.engine import Match, Piece, TensorSource
from parallel.outcome import Outcome

METRIC = "hidden_states"
STATE = "projection/"


def keep_outputs(chunks: Sequence[Any], layers: Collection[int]) -> dict[int, list[Tensor]]:
    """From now on collect what comes out of those layers that this rank has, by number, a tensor a forward pass."""
    kept: dict[int, list[Tensor]] = {}
    for number, layer in _layers_of(chunks):
        if number in layers:
            kept[number] = []
            layer.register_forward_hook(partial(_keep_output, kept[number]))
    return kept


class Matching:
    """What one rank adds to a student's loss, and the projections it trains for that.

    Attributes:
        sums: of the distance over counted tokens, as a mean over pairs; float32, shape (1,); 0 on ranks that hold what
            others count.

    Args:
        match: what is held against what.
        chunks: Megatron's GPTModel chunks of this rank.
        width: of the student.
        optim: AdamW settings of the student.
        splits_sequence: tensor ranks hold parts of the sequence between layers.
    """

    def __init__(
        self, match: Match, chunks: Sequence[Any], *, width: int, optim: OptimConfig, splits_sequence: bool
    ) -> None:
        self._match = match
        self._splits_sequence = splits_sequence
        self._tensor_group: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
        self._replicas: dist.ProcessGroup = parallel_state.get_data_parallel_group(with_context_parallel=True)
        device = next(chunks[0].parameters()).device
        self.sums = torch.zeros(1, device=device)
        self._counts = splits_sequence or self._tensor_group.rank() == 0
        self._masks_SB: list[Tensor] = []
        self._num_calls: dict[int, int] = {}
        self._projections: dict[int, torch.nn.Parameter] = {}
        for number, layer in _layers_of(chunks):
            if number in match.pairs:
                layer.register_forward_hook(partial(self._on_output, number))
                if width != match.width:
                    initial = initial_projection(match.seed, number, (match.width, width))
                    self._projections[number] = torch.nn.Parameter(initial.to(device))
        self._adam: torch.optim.AdamW = adam.make_adam(self._projections.values(), optim)
        adam.make_state(self._adam)

    @property
    def loss(self) -> Tensor:
        """What this rank adds to the sum of the loss over counted tokens, shape ()."""
        return self._match.weight * self.sums[0]

    def begin_step(self, masks_BS: Sequence[Tensor]) -> None:
        """Forget the last step; `masks_BS` say which tokens of this context rank count in each micro-batch."""
        self.sums.zero_()
        self._num_calls.clear()
        self._masks_SB = [mask.t() for mask in masks_BS]
        if self._splits_sequence:
            size, rank = self._tensor_group.size(), self._tensor_group.rank()
            self._masks_SB = [mask.chunk(size)[rank] for mask in self._masks_SB]
        for projection in self._projections.values():
            projection.grad = torch.zeros_like(projection)

    def _on_output(self, number: int, module: Any, given: Any, output: Any) -> Any:
        # Neither where nothing is learned, nor in the first pass of layers that are recomputed.
        if not torch.is_grad_enabled() or not self._masks_SB:
            return None
        hidden_SBD, *others = output if isinstance(output, tuple) else (output,)
        # Micro-batches go forward and backward in order, so the n-th call is about the n-th.
        index = self._num_calls.get(number, 0)
        self._num_calls[number] = index + 1
        target_SBT = self._match.targets[self._match.pairs[number]][index]
        gradient_SBD = self._learn(number, hidden_SBD, target_SBT, self._masks_SB[index])
        learned_SBD = cast(Tensor, _WithGradient.apply(hidden_SBD, gradient_SBD))  # type: ignore[no-untyped-call]
        return (learned_SBD, *others) if isinstance(output, tuple) else learned_SBD

    def _learn(self, number: int, hidden_SBD: Tensor, target_SBT: Tensor, mask_SB: Tensor) -> Tensor:
        """Add up the distance and the projection's gradient; returns the gradient of the hidden states."""
        projection_TD = self._projections.get(number)
        with torch.enable_grad():
            leaf_SBD = hidden_SBD.detach().float().requires_grad_()
            projected_SBT = leaf_SBD if projection_TD is None else leaf_SBD @ projection_TD.t()
            distance_SB = distance_of(projected_SBT, target_SBT.float(), self._match.distance)
            total = (distance_SB * mask_SB).sum() / len(self._match.pairs)
            learned = [leaf_SBD] if projection_TD is None else [leaf_SBD, projection_TD]
            gradient_SBD, *others = torch.autograd.grad(self._match.weight * total, learned)
        if projection_TD is not None:
            assert projection_TD.grad is not None, "a step was begun"
            projection_TD.grad += others[0]
        if self._counts:
            self.sums += total.detach()
        return gradient_SBD.to(hidden_SBD.dtype)

    def gather_gradients(self) -> Tensor:
        """Sum the projections' gradients over the ranks that saw other tokens; returns as `ShardedAdam`'s does."""
        squares = self.sums.new_zeros((), dtype=torch.float64)
        for projection in self._projections.values():
            assert projection.grad is not None, "a step was begun"
            dist.all_reduce(projection.grad, group=self._replicas)
            if self._splits_sequence:
                dist.all_reduce(projection.grad, group=self._tensor_group)
            squares += projection.grad.double().square().sum()
        return squares if self._is_first else torch.zeros_like(squares)

    @property
    def _is_first(self) -> bool:
        """Of the ranks of its stage, which all hold the same."""
        return self._replicas.rank() == 0 and self._tensor_group.rank() == 0

    def step(self, outcome: Outcome, *, learning_rate: float) -> None:
        """Update the projections as the model is, or leave them."""
        if self._projections:
            adam.prepare_step(self._adam, divisor=outcome.divisor, skip=outcome.skip, learning_rate=learning_rate)
            self._adam.step()

    def pieces(self) -> Iterator[Piece]:
        """The pieces of the projections and their state that this rank should save."""
        if self._is_first:
            for name, tensor in self._state():
                yield Piece(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor)

    @torch.no_grad()
    def load(self, source: TensorSource, *, num_steps: int) -> None:
        """Continue as after `num_steps` steps."""
        for name, tensor in self._state():
            tensor.copy_(source.read(name, (0,) * tensor.dim(), tuple(tensor.shape)))
        adam.set_num_steps(self._adam, num_steps)

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        for number, projection in self._projections.items():
            yield f"{STATE}{number}", projection.detach()
            for moment, values in adam.moments_of(self._adam, projection).items():
                yield f"{moment}/{STATE}{number}", values


def distance_of(projected: Tensor, target: Tensor, distance: Literal["cosine", "mse"]) -> Tensor:
    """Distance of each vector (the last dim) to its target.

    It is 1 - cosine, or the squared difference over the target's square: the same whatever the size of hidden states.
    """
    if distance == "cosine":
        return 1.0 - torch.nn.functional.cosine_similarity(projected, target, dim=-1)
    tiny = torch.finfo(torch.float32).tiny
    return (projected - target).square().mean(dim=-1) / target.square().mean(dim=-1).clamp_min(tiny)


def initial_projection(seed: int, number: int, shape: tuple[int, int]) -> Tensor:
    """Normal values that keep the size of what they multiply; a function of the seed and the layer's number."""
    key = hashlib.blake2b(f"{seed}/{STATE}{number}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)) / math.sqrt(shape[1])


class _WithGradient(torch.autograd.Function):
    """Its input, in whose gradient there is more."""

    @staticmethod
    def forward(ctx: Any, hidden_SBD: Tensor, gradient_SBD: Tensor) -> Tensor:
        ctx.save_for_backward(gradient_SBD)
        # Not a view: Megatron refuses to free a stage's output that is one.
        same = hidden_SBD.new_empty(1)
        same.data = hidden_SBD.data
        return same

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient_SBD,) = ctx.saved_tensors
        return gradients[0] + gradient_SBD, None


def _keep_output(kept: list[Tensor], module: Any, given: Any, output: Any) -> None:
    kept.append(output[0] if isinstance(output, tuple) else output)


def _layers_of(chunks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            yield layer.layer_number - 1, layer
