"""What the checkpoint tests save: a provenance, tensors, and ways to cut them into the pieces of several ranks."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from conf.schema import EngineConfig, MeshConfig, ModelConfig
from parallel.engine import Piece
from train.checkpoint import Checkpoint, checkpoint_name
from train.manifest import Provenance
from train.saver import Saver

MODEL = ModelConfig(
    name="tiny",
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=16,
    num_attention_heads=2,
    num_kv_heads=1,
    head_dim=4,
    vocab_size=32,
    max_sequence_length=16,
    rope_theta=10000.0,
    norm_epsilon=1e-5,
    init_std=0.02,
    tied_embeddings=False,
)
ENGINE = EngineConfig(
    backend="megatron",
    mesh=MeshConfig(tensor=1, context=1, pipeline=1, virtual_pipeline=1, data=1),
    precision="fp32",
    sequence_parallel=False,
    zero_stage=1,
    offload_optimizer="none",
    overlap=False,
    recompute="none",
)
PROVENANCE = Provenance(
    run="run-1",
    recipe="tiny_module",
    stage="pretrain",
    model=MODEL,
    engine=ENGINE,
    tokenizer="0" * 64,
    data={"business": "1" * 64},
    parents=(),
)


def sample_tensors(seed: int = 0) -> dict[str, Tensor]:
    """A few tensors of unlike dtypes and ranks, a scalar and an empty one among them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.embed_tokens.weight": torch.randn(12, 8, generator=generator),
        "model.norm.weight": torch.randn(7, generator=generator).to(torch.bfloat16),
        "lm_head.weight": torch.randn(3, 4, 5, generator=generator).to(torch.float16),
        "step": torch.tensor(41 + seed),
        "mask": torch.randint(0, 2, (9,), generator=generator).bool(),
        "nothing": torch.empty(0, 3),
    }


def cut(name: str, tensor: Tensor, num_ranks: int, chance: random.Random) -> list[list[Piece]]:
    """Cut a tensor into random boxes and deal them to ranks; every element is in exactly one piece."""
    boxes = [((0,) * tensor.dim(), tuple(tensor.shape))]
    for _ in range(chance.randrange(6) if tensor.dim() and tensor.numel() else 0):
        offset, shape = boxes.pop(chance.randrange(len(boxes)))
        dim = chance.randrange(tensor.dim())
        size = chance.randint(0, shape[dim])
        boxes.append((offset, (*shape[:dim], size, *shape[dim + 1 :])))
        offset = (*offset[:dim], offset[dim] + size, *offset[dim + 1 :])
        boxes.append((offset, (*shape[:dim], shape[dim] - size, *shape[dim + 1 :])))
    dealt: list[list[Piece]] = [[] for _ in range(num_ranks)]
    for offset, shape in boxes:
        view = tensor[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
        dealt[chance.randrange(num_ranks)].append(Piece(name, tuple(tensor.shape), offset, view))
    return dealt


def whole(tensors: Mapping[str, Tensor]) -> list[Piece]:
    """Every tensor as one piece."""
    return [Piece(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor) for name, tensor in tensors.items()]


def save_alone(directory: Path, step: int, tensors: Mapping[str, Tensor], keep: int = 9) -> Checkpoint:
    """One rank saves and waits."""
    saver = Saver(directory, rank=0, world_size=1, keep=keep)
    save(saver, step, tensors)
    saver.wait()
    return Checkpoint.open(directory / checkpoint_name(step))


def save(saver: Saver, step: int, tensors: Mapping[str, Tensor]) -> None:
    """Start saving tensors, as weights and as resume state alike."""
    pieces = whole(tensors)
    saver.save(step, weights=pieces, resume=pieces, provenance=PROVENANCE, samples=step * 4, tokens=step * 64)


def save_together(directory: Path, step: int, weights_of_rank: Sequence[Sequence[Piece]]) -> Checkpoint:
    """Ranks (their savers, in this process) save and wait together."""
    num_ranks = len(weights_of_rank)
    savers = [Saver(directory, rank=rank, world_size=num_ranks, keep=9) for rank in range(num_ranks)]
    for saver, weights in zip(savers, weights_of_rank, strict=True):
        saver.save(step, weights=weights, resume=[], provenance=PROVENANCE, samples=step * 4, tokens=step * 64)
    for saver in savers:
        saver.wait()
    return Checkpoint.open(directory / checkpoint_name(step))
