"""This rank's part of a model: Megatron's modules, and which boxes of which logical tensors their parameters are.

What is saved and loaded follows from that alone, whatever trains the modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from conf.schema import EngineConfig, ModelConfig
from parallel import weight_names
from parallel.boxes import Box
from parallel.cpu import adapt_megatron, tensors_as_on_cuda
from parallel.device import this_device
from parallel.engine import Piece, TensorSource
from parallel.groups import megatron_coordinate
from parallel.mesh import Mesh
from parallel.model import build_chunks, first_layer_of
from parallel.optimizer import FamilyAdam, OptimizerShard, families_of
from parallel.state import pieces_of, read_range

MASTER = "master/"


class ShardedModel:
    """GPTModel chunks of this rank with undefined weights, and their place in the whole model.

    Attributes:
        chunks: one a virtual pipeline stage.
        parameters: each parameter of the chunks -> the boxes that its rows are, in order.
        families: the parameters by which ranks hold equal copies.
        experts: numbers of the experts that this rank holds.
    """

    def __init__(self, model: ModelConfig, engine: EngineConfig, mesh: Mesh) -> None:
        adapt_megatron()
        self.config = model
        self.mesh = mesh
        self.coordinate = mesh.coordinate(dist.get_rank())
        assert self.coordinate == megatron_coordinate(), "Megatron's groups are of another mesh"
        self.device = this_device()
        self.tensor_group: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
        self.is_last = self.coordinate.pipeline == mesh.pipeline - 1
        self.experts = weight_names.experts_of_rank(model, mesh.expert_rank(self.coordinate), mesh.expert)
        with tensors_as_on_cuda():
            self.chunks: list[Any] = build_chunks(model, engine, mesh)
        self.parameters: dict[Any, tuple[Box, ...]] = dict(self._boxes_of_parameters())
        self.families = families_of(self.parameters)

    def _boxes_of_parameters(self) -> Iterator[tuple[Any, tuple[Box, ...]]]:
        for chunk in self.chunks:
            for name, parameter in chunk.named_parameters():
                boxes = weight_names.boxes_of_parameter(
                    self.config,
                    name,
                    first_layer=first_layer_of(chunk),
                    tensor_rank=self.coordinate.tensor,
                    tensor_size=self.mesh.tensor,
                    experts=self.experts,
                )
                assert sum(box.num_elements for box in boxes) == parameter.numel(), name
                # Megatron marks what is sliced over tensor ranks only where it initialises weights itself; unmarked
                # parameters would count once in the gradient norm instead of once a tensor rank.
                parameter.tensor_model_parallel = boxes[0].shape != boxes[0].global_shape
                yield parameter, boxes

    def let_go(self) -> None:
        """Free the modules and their parameters."""
        self.chunks, self.parameters, self.families = [], {}, []

    @property
    def head_weight(self) -> Tensor:
        """This tensor rank's rows of the output head, (V, D); on the last pipeline rank."""
        chunk = self.chunks[-1]
        return cast(Tensor, chunk.shared_embedding_or_output_weight() if self.is_tied else chunk.output_layer.weight)

    @property
    def is_tied(self) -> bool:
        """The output head is the embedding."""
        return cast(bool, self.chunks[-1].share_embeddings_and_output_weights)

    def saves(self, parameter: Any) -> bool:
        """Whether this rank is among those that save a parameter which others hold as well."""
        is_tied_copy = getattr(parameter, "shared", False)
        return not is_tied_copy and (parameter.tensor_model_parallel or self.coordinate.tensor == 0)

    def weights(self) -> Iterator[Piece]:
        """See `Engine.weights`; the parameters must be whole and up to date."""
        for family in self.families:
            saved = [parameter for parameter in family.parameters if self.saves(parameter)]
            for parameter, (start, stop) in zip(saved, family.share(saved), strict=True):
                yield from pieces_of(parameter.detach().view(-1)[start:stop], self.parameters[parameter], start)

    @torch.no_grad()
    def load_weights(self, source: TensorSource, adams: Sequence[FamilyAdam]) -> None:
        """See `Engine.load_weights`; `adams` are those of the model."""
        shards = {shard.parameter: shard for adam in adams if adam.masters_apart for shard in adam.shards()}
        for parameter, boxes in self.parameters.items():
            values = read_range(source, boxes, 0, parameter.numel())
            parameter.copy_(values.view_as(parameter))
            if parameter in shards:
                shard = shards[parameter]
                shard.main.copy_(values[shard.start : shard.stop].view_as(shard.main))

    def optimizer_state(self, adam: FamilyAdam, *, with_masters: bool) -> Iterator[Piece]:
        """The pieces of the state of one family's optimizer that this rank should save."""
        shards = [shard for shard in adam.shards() if self.saves(shard.parameter)]
        if adam.distributed:
            ranges = [(0, shard.main.numel()) for shard in shards]
        else:
            ranges = adam.family.share([shard.main for shard in shards])
        for shard, (start, stop) in zip(shards, ranges, strict=True):
            boxes = self.parameters[shard.parameter]
            for prefix, values in _state_of(shard, with_masters):
                part = values.detach().view(-1)[start:stop]
                yield from pieces_of(part, boxes, shard.start + start, prefix=prefix)

    @torch.no_grad()
    def load_optimizer_state(self, source: TensorSource, adam: FamilyAdam, *, with_masters: bool) -> None:
        """Fill the state of one family's optimizer."""
        for shard in adam.shards():
            for prefix, values in _state_of(shard, with_masters):
                boxes = self.parameters[shard.parameter]
                values.copy_(read_range(source, boxes, shard.start, shard.stop, prefix=prefix).view_as(values))


def _state_of(shard: OptimizerShard, with_masters: bool) -> list[tuple[str, Tensor]]:
    """What a resume needs of a shard besides the weights, by prefix of its canonical name."""
    state = [(f"{name}/", moment) for name, moment in shard.moments.items()]
    return [*state, (MASTER, shard.main)] if with_masters else state
