"""The seam between the training loop and a backend: a model spread over a mesh that can take a step.

The seam is the whole step, because pipeline schedules own the micro-batches. State crosses it as *pieces*: boxes of
canonically named logical tensors, so any layout of any engine can read what any other wrote.

Shape suffixes: B rows, S tokens, V vocabulary (this tensor rank's part of it in `logits_BSV`).
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self, TypeVar

from torch import Tensor
from torch.distributed import ProcessGroup

from conf.errors import UserError
from conf.schema import EngineConfig, ModelConfig, OptimConfig, Scheme
from data.batch import Batch
from parallel.importance import Importance
from parallel.mesh import Coordinate, Mesh
from parallel.ranges import Channels

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a logical tensor that this rank holds.

    Attributes:
        name: canonical (Hugging Face Llama) name of the logical tensor, e.g. `model.layers.3.mlp.up_proj.weight`;
            optimizer state adds a prefix: `exp_avg/`, `exp_avg_sq/`, `master/`.
        global_shape: shape of the whole logical tensor, whatever the layout.
        offset: first index of the box in each dimension.
        tensor: the values; its shape is the box's shape. May be a view of live memory: copy before the next step.
    """

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor


class TensorSource(Protocol):
    """Something any box of any logical tensor can be read from: a checkpoint, or fresh random weights."""

    def read(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The box of the named tensor that starts at `offset`, on the CPU.

        Raises:
            CheckpointError: there is no such tensor, the box is outside it, or its bytes are damaged.
        """
        ...


@dataclass(frozen=True, slots=True)
class LossSums:
    """What an objective makes of the logits of one micro-batch; the engine divides by global counts.

    Attributes:
        loss: differentiable sum over counted tokens of this rank's part of the micro-batch, in nats, shape ().
        num_tokens: counted tokens, shape ().
        metrics: further sums over counted tokens to be averaged and reported, by name (detached, shape ()).
    """

    loss: Tensor
    num_tokens: Tensor
    metrics: dict[str, Tensor]


class Objective(Protocol):
    """A loss. Called on the last pipeline rank with the logits of one micro-batch."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics it reports, in order: ranks that see no logits take part in the same all-reduce."""
        ...

    def __call__(
        self, logits_BSV: Tensor, labels_BS: Tensor, loss_mask_BS: Tensor, tensor_group: ProcessGroup
    ) -> LossSums:
        """Sums over this rank's tokens. `logits_BSV` holds this tensor rank's slice of the vocabulary."""
        ...


class Tokenwise:
    """Base of objectives that are sums over tokens, each of them from its own logits.

    An engine may call them with a slice of the tokens at a time and add up; others get the logits of a micro-batch.
    """

    __slots__ = ()

    def at(self, tokens: slice) -> Self:
        """The objective of some tokens of every row: what is called with their logits."""
        return self


@dataclass(frozen=True, slots=True)
class Logits:
    """Logits of one micro-batch that are multiplied out when they are asked for, so that a few exist at a time.

    Attributes:
        hidden_BSD: what goes into the output head, whole rows of this context rank.
        weight_VD: this tensor rank's rows of the head.
        group: the tensor ranks.
    """

    hidden_BSD: Tensor
    weight_VD: Tensor
    group: ProcessGroup | None

    def at(self, tokens: slice) -> Tensor:
        """Logits of some tokens of every row, this tensor rank's slice of the vocabulary (BSV)."""
        return self.hidden_BSD[:, tokens] @ self.weight_VD.t()


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """Outputs of a student's layers that are held against those of a teacher's; layers are counted from 0.

    Attributes:
        pairs: the student's layer -> the teacher's, on the same ranks.
        targets: what came out of the teacher's layers of this rank for the micro-batches of the coming step
            (`Engine.keep_outputs`); spread as the student's.
        width: hidden size of the teacher.
        distance: cosine is 1 - cosine, mse the squared difference over the target's square.
        weight: what the mean over pairs is multiplied by in the loss of a token.
        seed: of projections.
    """

    pairs: Mapping[int, int]
    targets: Mapping[int, Sequence[Tensor]]
    width: int
    distance: Literal["cosine", "mse"]
    weight: float
    seed: int


@dataclass(frozen=True, slots=True)
class StepResult:
    """The same on every rank.

    Attributes:
        loss: mean of the objective over counted tokens of the global batch, in nats.
        grad_norm: global L2 norm before clipping.
        num_tokens: counted tokens of the global batch.
        metrics: the objective's further metrics, averaged over counted tokens.
        stop: some rank asked to stop.
    """

    loss: float
    grad_norm: float
    num_tokens: int
    metrics: dict[str, float]
    stop: bool


@dataclass(frozen=True, slots=True)
class RowScores:
    """How the model predicts each row; the same on every rank, on the CPU, rows in order of data rank.

    Attributes:
        sample_ids_B: whose row it is.
        loss_B: float64 sum of the negative log-likelihood over counted tokens, in nats.
        correct_B: float64 number of counted tokens whose label has the largest logit.
        num_tokens_B: float64 counted tokens.
    """

    sample_ids_B: Tensor
    loss_B: Tensor
    correct_B: Tensor
    num_tokens_B: Tensor


class Engine(Protocol):
    """A model spread over a mesh."""

    mesh: Mesh
    coordinate: Coordinate
    num_parameters: int
    """Of the whole model, whatever the layout; tied embeddings count once."""

    def step(
        self,
        micro_batches: Sequence[Batch],
        objective: Objective | Sequence[Objective],
        *,
        learning_rate: float,
        stop: bool = False,
    ) -> StepResult:
        """Train on this data rank's micro-batches of one global batch.

        Args:
            micro_batches: the same number and shape on every data rank; ranks of one data coordinate get equal ones.
            objective: the loss, or one for each micro-batch where it knows something about it (a teacher's logits).
            learning_rate: of this step.
            stop: this rank asks everyone to stop; agreed on the step's own all-reduce.

        Raises:
            FloatingPointError: the loss or gradient norm is not finite; weights and optimizer are unchanged.
            StepOutOfMemoryError: with the part of the step in which memory ran out.
        """
        ...

    def score(self, micro_batches: Sequence[Batch]) -> RowScores:
        """Score held-out rows without training; every data rank gives the same number of equally shaped batches."""
        ...

    def predict(self, micro_batches: Sequence[Batch], read: Callable[[Logits], T]) -> list[T]:
        """Forward passes in inference mode, of batches shaped as in `step`; of an engine without an optimizer.

        Args:
            micro_batches: of this data rank.
            read: what to keep of the logits of a micro-batch.

        Returns:
            On the last pipeline rank what `read` returned for each micro-batch; nothing elsewhere.
        """
        ...

    def keep_outputs(self, layers: Collection[int]) -> Mapping[int, Sequence[Tensor]]:
        """From now on keep what comes out of those layers, counted from 0, that this rank has.

        Returns:
            By layer a tensor for each micro-batch of the last forward passes, as it is spread over tensor and context
            ranks between layers.
        """
        ...

    def match_outputs(self, match: Match) -> None:
        """From now on learn in every step from the outputs of another model's layers too; once an engine.

        Steps report the mean distance as `hidden_states`, and their loss has it in it.
        """
        ...

    def observe(self, micro_batches: Sequence[Batch]) -> Importance:
        """How much each part of the model matters for these rows, from activations; forward passes only.

        Every data rank gives the same number of equally shaped batches, and every token counts.

        Raises:
            FloatingPointError: scores are not finite.
        """
        ...

    def input_ranges(self, micro_batches: Sequence[Batch]) -> Channels:
        """The largest absolute value of every channel that goes into the layers' matrices; forward passes only.

        Raises:
            FloatingPointError: an activation is not finite.
        """
        ...

    def round_inputs(self, scheme: Scheme, kept_layers: Collection[int]) -> None:
        """From now on round what goes into the layers' matrices, a scale a token, but for `kept_layers`.

        Takes the place of what was said before; nothing is rounded under a scheme that leaves inputs as they are.
        """
        ...

    def weights(self) -> Iterator[Piece]:
        """The pieces of the weights that this rank should save: over all ranks every element exactly once."""
        ...

    def load_weights(self, source: TensorSource) -> None:
        """Fill the model (and the optimizer's master weights) from canonical tensors."""
        ...

    def optimizer_state(self) -> Iterator[Piece]:
        """The pieces of the optimizer's state that this rank should save: over all ranks every element once."""
        ...

    def load_optimizer_state(self, source: TensorSource, *, num_steps: int) -> None:
        """Continue the optimizer as it was after `num_steps` steps."""
        ...

    def peak_memory_bytes(self) -> int:
        """Largest device memory this rank had allocated since the start (resident set size on a CPU)."""
        ...

    def close(self) -> None:
        """Free the model and its buffers; process groups stay for the next engine."""
        ...


def make_engine(
    model: ModelConfig, engine: EngineConfig, optim: OptimConfig | None, mesh: Mesh, *, micro_batch: int
) -> Engine:
    """Build the engine of `engine.backend` on this rank; weights are undefined until `load_weights`.

    Args:
        model: shape of the model.
        engine: how it is spread; `engine.mesh` is already resolved into `mesh`.
        optim: AdamW settings, or None for an engine that only scores (no gradient buffers, no optimizer).
        mesh: the axes; the one that `groups.enter_mesh` entered.
        micro_batch: rows of every micro-batch (pipeline buffers have a fixed shape).
    """
    return _class_of(engine.backend)(model, engine, optim, mesh, micro_batch=micro_batch)


def _class_of(backend: str) -> Callable[..., Engine]:
    # Backends take seconds to import, so only the one that is used is.
    try:
        match backend:
            case "megatron":
                from parallel.megatron import MegatronEngine

                return MegatronEngine
            case "deepspeed":
                from parallel.deepspeed import DeepSpeedEngine

                return DeepSpeedEngine
    except ModuleNotFoundError as error:
        raise UserError(
            f"engine.backend={backend} cannot be used on {socket.gethostname()}: the package {error.name} is missing "
            f"in its Python environment ({sys.prefix}). It comes with this project: pip install -e . on every node."
        ) from error
    raise AssertionError(f"there is no engine {backend}")


__all__ = [
    "Engine",
    "Logits",
    "LossSums",
    "Match",
    "Objective",
    "Piece",
    "RowScores",
    "StepResult",
    "TensorSource",
    "Tokenwise",
    "make_engine",
]
