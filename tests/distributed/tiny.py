"""A tiny model, its data, and training it: what tests compare across layouts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from conf.errors import CheckpointError
from conf.schema import EngineConfig, MeshConfig, ModelConfig, OptimConfig
from data.batch import Batch
from parallel.engine import Engine, Piece, StepResult, TensorSource, make_engine
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


def train(engine: Engine, steps: range) -> list[StepResult]:
    """Take steps; the learning rate warms up and falls, as a schedule would have it."""
    return [
        engine.step(
            batches(step, engine.mesh, engine.coordinate.data),
            CrossEntropy(z_loss=1e-4),
            learning_rate=OPTIM.learning_rate * min(step + 1, 20 - step) / 10,
        )
        for step in steps
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
