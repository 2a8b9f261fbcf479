"""A tiny model, its data, and training it: what tests compare across layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from tempfile import gettempdir
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from conf.errors import CheckpointError
from conf.schema import EngineConfig, MeshConfig, ModelConfig, OptimConfig
from data.batch import Batch, positions_in_documents
from parallel.engine import Engine, Piece, StepResult, TensorSource, make_engine
from parallel.initial import InitialWeights
from parallel.loss import CrossEntropy
from parallel.mesh import Mesh

MODEL = ModelConfig(
    name="tiny",
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=160,
    num_attention_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=256,
    max_sequence_length=32,
    rope_theta=10_000.0,
    norm_epsilon=1e-5,
    init_std=0.02,
    tied_embeddings=False,
)
TIED = replace(MODEL, name="tiny-tied", tied_embeddings=True)
OPTIM = OptimConfig(
    learning_rate=3e-3,
    final_learning_rate_ratio=0.1,
    schedule="cosine",
    warmup_fraction=0.1,
    decay_fraction=0.0,
    beta1=0.9,
    beta2=0.95,
    epsilon=1e-8,
    weight_decay=0.1,
    clip_grad_norm=1.0,
)
GLOBAL_BATCH, MICRO_BATCH, LENGTH, SEED = 8, 2, 32, 7
HELD_OUT = 1000  # a step that is never trained on
NUM_DOCUMENTS = 3  # of a packed row


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the tiny model is spread in one comparison."""

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    data: int = 1
    expert: int = 1
    sequence_parallel: bool = False
    backend: str = "megatron"
    zero_stage: int = 0
    offload_optimizer: str = "none"
    overlap: bool = False
    precision: str = "fp32"
    recompute: str = "none"
    offload_activations: bool = False

    @property
    def mesh(self) -> Mesh:
        axes = {"pipeline": self.pipeline, "data": self.data, "context": self.context, "tensor": self.tensor}
        return Mesh(**axes, expert=self.expert)

    @property
    def engine(self) -> EngineConfig:
        return EngineConfig(
            backend=self.backend,  # type: ignore[arg-type]
            mesh=MeshConfig(
                tensor=self.tensor,
                context=self.context,
                pipeline=self.pipeline,
                virtual_pipeline=self.virtual_pipeline,
                data=self.data,
                expert=self.expert,
            ),
            precision=self.precision,  # type: ignore[arg-type]
            sequence_parallel=self.sequence_parallel,
            zero_stage=self.zero_stage,  # type: ignore[arg-type]
            offload_optimizer=self.offload_optimizer,  # type: ignore[arg-type]
            offload_directory=gettempdir() if self.offload_optimizer == "nvme" else None,
            overlap=self.overlap,
            recompute=self.recompute,  # type: ignore[arg-type]
            offload_activations=self.offload_activations,
        )


def tiny_engine(layout: Layout, model: ModelConfig = MODEL, optim: OptimConfig | None = OPTIM) -> Engine:
    return make_engine(model, layout.engine, optim, layout.mesh, micro_batch=MICRO_BATCH)


def batches(step: int, mesh: Mesh, data_rank: int) -> list[Batch]:
    """A data rank's micro-batches of a step: next token is 3 t + 7 with noise; rows count unequal numbers of tokens."""
    random = np.random.default_rng([SEED, step])
    rows = np.empty((GLOBAL_BATCH, LENGTH + 1), dtype=np.int64)
    rows[:, 0] = random.integers(MODEL.vocab_size, size=GLOBAL_BATCH)
    for place in range(LENGTH):
        following = (3 * rows[:, place] + 7) % MODEL.vocab_size
        noise = random.integers(MODEL.vocab_size, size=GLOBAL_BATCH)
        rows[:, place + 1] = np.where(random.random(GLOBAL_BATCH) < 0.1, noise, following)
    mask = (random.random((GLOBAL_BATCH, LENGTH)) < random.random((GLOBAL_BATCH, 1))).astype(np.float32)
    per_rank = GLOBAL_BATCH // mesh.data
    first = data_rank * per_rank
    return [
        Batch(
            tokens_BS=rows[at : at + MICRO_BATCH, :-1],
            labels_BS=rows[at : at + MICRO_BATCH, 1:],
            loss_mask_BS=mask[at : at + MICRO_BATCH],
            position_ids_BS=np.tile(np.arange(LENGTH), (MICRO_BATCH, 1)),
            sample_ids_B=np.arange(at, at + MICRO_BATCH) + step * GLOBAL_BATCH,
        )
        for at in range(first, first + per_rank, MICRO_BATCH)
    ]


def packed(step: int, mesh: Mesh, data_rank: int) -> list[Batch]:
    """`batches` whose rows are several documents each; those of the first micro-batch are whole."""
    random = np.random.default_rng([SEED, step, 1])
    starts = np.zeros((GLOBAL_BATCH, LENGTH), dtype=np.bool_)
    for row in range(MICRO_BATCH, GLOBAL_BATCH):
        starts[row, 1 + random.choice(LENGTH - 1, NUM_DOCUMENTS - 1, replace=False)] = True
    positions = positions_in_documents(starts)
    whole = batches(step, mesh, data_rank)
    return [replace(batch, position_ids_BS=positions[batch.sample_ids_B - step * GLOBAL_BATCH]) for batch in whole]


def apart(step: int, mesh: Mesh, data_rank: int) -> list[Batch]:
    """The documents of `packed`, each at the beginning of a row of its own; what fills the row does not count."""
    return [_documents(batch, number) for batch in packed(step, mesh, data_rank) for number in range(NUM_DOCUMENTS)]


def _documents(batch: Batch, number: int) -> Batch:
    def moved(array: Any) -> Any:
        rows = np.zeros_like(array)
        for row, positions in enumerate(batch.position_ids_BS):
            document = array[row, (positions == 0).cumsum() == number + 1]
            rows[row, : len(document)] = document
        return rows

    return replace(
        batch,
        tokens_BS=moved(batch.tokens_BS),
        labels_BS=moved(batch.labels_BS),
        loss_mask_BS=moved(batch.loss_mask_BS),
        position_ids_BS=np.tile(np.arange(LENGTH), (MICRO_BATCH, 1)),
    )


def train(
    engine: Engine, steps: range, batches_of: Callable[[int, Mesh, int], list[Batch]] = batches
) -> list[StepResult]:
    """Take steps; the learning rate warms up and falls, as a schedule would have it."""
    return [
        engine.step(
            batches_of(step, engine.mesh, engine.coordinate.data),
            CrossEntropy(z_loss=1e-4),
            learning_rate=OPTIM.learning_rate * min(step + 1, 20 - step) / 10,
        )
        for step in steps
    ]


@dataclass(frozen=True)
class Curve:
    """What training looked like on a rank, and how held-out rows scored after it."""

    steps: list[StepResult]
    held_out: dict[str, list[float]]

    def of(self, name: str) -> list[float]:
        """The values of a step's field or metric."""
        return [step.metrics[name] if name in step.metrics else getattr(step, name) for step in self.steps]

    def losses(self) -> list[float]:
        return self.of("loss")

    def grad_norms(self) -> list[float]:
        return self.of("grad_norm")


def on_mesh(layout: Layout, run: Callable[..., Any], *args: Any) -> Any:
    """What `run(layout, *args)` returns within the groups of the layout's mesh."""
    from parallel import groups

    groups.enter_mesh(layout.mesh, virtual_pipeline=layout.virtual_pipeline)
    try:
        return run(layout, *args)
    finally:
        groups.leave_mesh()


def fresh(layout: Layout, model: ModelConfig = MODEL) -> Engine:
    """An engine with weights that every layout begins with."""
    engine = tiny_engine(layout, model)
    engine.load_weights(InitialWeights(model, 1))
    return engine


def train_and_score(
    layout: Layout,
    model: ModelConfig,
    num_steps: int,
    batches_of: Callable[[int, Mesh, int], list[Batch]] = batches,
) -> Curve:
    engine = fresh(layout, model)
    steps = train(engine, range(num_steps), batches_of)
    rows = engine.score(batches_of(HELD_OUT, engine.mesh, engine.coordinate.data))
    engine.close()
    return Curve(steps, {field.name: getattr(rows, field.name).tolist() for field in fields(rows)})


def save(engine: Engine) -> tuple[Tensors, Tensors]:
    """Weights and optimizer state, whole."""
    return Tensors.gather(list(engine.weights())), Tensors.gather(list(engine.optimizer_state()))


def restore(engine: Engine, state: tuple[Tensors, Tensors], num_steps: int) -> None:
    engine.load_weights(state[0])
    engine.load_optimizer_state(state[1], num_steps=num_steps)


def differing(one: tuple[Tensors, Tensors], other: tuple[Tensors, Tensors]) -> list[str]:
    """Names of the tensors that are not the same to the last bit."""
    return [
        name
        for mine, its in zip(one, other, strict=True)
        for name, tensor in mine.tensors.items()
        if not torch.equal(tensor, its.tensors[name])
    ]


class Tensors(TensorSource):
    """Whole logical tensors in memory, put together from the pieces of all ranks."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    @classmethod
    def gather(cls, pieces: list[Piece]) -> Tensors:
        """Put together what all ranks of the world save; every element must come exactly once."""
        mine = [replace(piece, tensor=piece.tensor.clone()) for piece in pieces]
        everyone: list[list[Piece]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
        tensors: dict[str, torch.Tensor] = {}
        counts: dict[str, torch.Tensor] = {}
        for piece in (piece for rank in everyone for piece in rank):
            if piece.name not in tensors:
                tensors[piece.name] = torch.empty(piece.global_shape, dtype=piece.tensor.dtype)
                counts[piece.name] = torch.zeros(piece.global_shape, dtype=torch.int32)
            box = tuple(
                slice(start, start + size) for start, size in zip(piece.offset, piece.tensor.shape, strict=True)
            )
            tensors[piece.name][box] = piece.tensor
            counts[piece.name][box] += 1
        for name, count in counts.items():
            assert (count == 1).all(), f"{name}: elements saved {count.min()} to {count.max()} times"
        return cls(tensors)

    def read(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        if name not in self.tensors:
            raise CheckpointError(f"no tensor {name}")
        return self.tensors[name][tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
