"""The planner's memory model against what the engine really allocates, rank by rank, on this machine.

    python -m bench.memory [--tokens 1024]

Each layout is run as one rank of its mesh: the process group is torch's fake one, whose collectives return at once, so
a single process builds the engine of any rank of any mesh and takes a whole step through Megatron's own schedule. The
values are noise, the tensors are real. Counted are the bytes of parameters, gradients and optimizer state, what
autograd keeps for the backward pass (saved-tensor hooks), and the most that all tensors take at once (every storage
that a dispatch mode sees, from its birth to its end). Where there is a GPU, the engine runs there and the peak is the
allocator's.
"""

from __future__ import annotations

import argparse
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention.bias import causal_lower_right
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bench.settings import OPTIM, dense_model, engine_of, random_batches
from conf.schema import EngineConfig, ModelConfig, TrainingConfig
from data.batch import Batch
from parallel import attention, offload
from parallel.distillation import Distillation, FromTeacher
from parallel.engine import Objective
from parallel.groups import enter_mesh, leave_mesh
from parallel.loss import CrossEntropy
from parallel.megatron import MegatronEngine
from parallel.mesh import Mesh
from parallel.plan.configured import layout_of
from parallel.plan.layout import OURS, Layout
from parallel.plan.memory import WORKSPACE_BYTES, chunks_in_flight, kept_bytes, recomputed_bytes, stage_memory
from parallel.plan.shapes import Teacher, shape_of

MODEL = dense_model(
    name="bench",
    num_layers=8,
    hidden_size=512,
    ffn_hidden_size=1792,
    num_attention_heads=16,
    num_kv_heads=4,
    head_dim=32,
    vocab_size=8192,
    max_sequence_length=8192,
)
TOKENS = 512
ON_CPU = {"bf16": 12.0, "fp32": 4.0}
"""Bytes over the hidden size that a layer keeps more on a CPU, where torch's RMSNorm is made of elementary operations
and keeps its input and its result in fp32; the fused kernel keeps its input."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A layout to be measured on its first and its last pipeline rank."""

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    data: int = 1
    micro_batch: int = 1
    micro_batches: int = 1
    recompute: str = "none"
    offload_activations: bool = False
    precision: str = "bf16"
    zero_stage: Literal[0, 1] = 1
    sequence_parallel: bool = True
    tied: bool = False
    taught: Literal["no", "by all", "by few"] = "no"
    """Whether it learns from all logits of a teacher of its own shape, or from the likeliest of them."""

    def __str__(self) -> str:
        words = [f"tensor {self.tensor}", f"context {self.context}", f"pipeline {self.pipeline}"]
        words += [f"x {self.virtual_pipeline}"] if self.virtual_pipeline > 1 else []
        words += [f"data {self.data}", f"micro {self.micro_batch} x {self.micro_batches}"]
        words += [f"recompute {self.recompute}"] if self.recompute != "none" else []
        words += ["offloaded"] if self.offload_activations else []
        words += [self.precision] if self.precision != "bf16" else []
        words += ["zero_stage 0"] if self.zero_stage == 0 else []
        words += ["no sequence parallel"] if self.tensor > 1 and not self.sequence_parallel else []
        words += ["tied"] if self.tied else []
        words += [f"taught {self.taught}"] if self.taught != "no" else []
        return " ".join(words)

    @property
    def mesh(self) -> Mesh:
        """Its axes."""
        return Mesh(tensor=self.tensor, context=self.context, pipeline=self.pipeline, data=self.data)

    @property
    def top_k(self) -> int:
        """Logits kept of a teacher a token; 0: all."""
        return TOP_K if self.taught == "by few" else 0

    @property
    def model(self) -> ModelConfig:
        """The model, with tied embeddings where asked."""
        return replace(MODEL, tied_embeddings=self.tied)

    @property
    def engine(self) -> EngineConfig:
        """As a recipe would say it."""
        axes = ("tensor", "context", "pipeline", "virtual_pipeline", "data")
        return engine_of(
            mesh={axis: getattr(self, axis) for axis in axes},
            precision=self.precision,
            sequence_parallel=self.sequence_parallel and self.tensor > 1,
            zero_stage=self.zero_stage,
            overlap=self.zero_stage > 0,
            recompute=self.recompute,
            offload_activations=self.offload_activations,
        )

    def training(self, tokens: int) -> TrainingConfig:
        """A stage of one step."""
        return TrainingConfig(
            tokens=tokens,
            global_batch=self.data * self.micro_batch * self.micro_batches,
            micro_batch=self.micro_batch,
            sequence_length=tokens,
            mixture={"text": 1.0},
            optim=OPTIM,
            z_loss=0.0,
            validate_every_steps=0,
            validation_tokens=tokens,
            checkpoint_every_steps=0,
            keep_checkpoints=1,
        )


TOP_K = 64

Lesson = Callable[[Sequence[Batch]], Objective | Sequence[Objective]]

TRIALS = (
    Trial(micro_batches=2),
    Trial(micro_batch=2, tied=True),
    Trial(data=8, zero_stage=0),
    Trial(data=8, precision="fp32"),
    Trial(tensor=4, data=8),
    Trial(tensor=4, data=2, sequence_parallel=False),
    Trial(context=2, data=4),
    Trial(pipeline=4, data=2, micro_batches=8),
    Trial(pipeline=4, virtual_pipeline=2, micro_batches=8),
    Trial(data=4, recompute="selective"),
    Trial(data=4, micro_batch=2, recompute="full"),
    Trial(tensor=2, pipeline=2, data=8, micro_batches=4, recompute="selective"),
    Trial(tensor=4, context=2, pipeline=4, virtual_pipeline=2, data=64, micro_batches=8),
    Trial(data=4, micro_batch=2, offload_activations=True),
    Trial(pipeline=2, data=2, micro_batches=4, offload_activations=True),
)
TAUGHT = (
    Trial(micro_batches=2, taught="by all"),
    Trial(micro_batches=2, taught="by few"),
    Trial(tensor=4, data=2, micro_batches=2, taught="by all"),
    Trial(micro_batches=4, precision="fp32", taught="by all"),
)
QUICK = (TRIALS[10], replace(TRIALS[12], data=2), TRIALS[13])


@dataclass(frozen=True, kw_only=True, slots=True)
class Bytes:
    """Bytes on one rank."""

    weights: float
    gradients: float
    optimizer: float
    saved: float
    """Most that autograd keeps for the backward pass at once, logits apart; nan where that is in host memory, and hooks
    of torch's show what is outside of the layers alone."""
    peak: float
    """Most that all tensors take at once."""


class Live(TorchDispatchMode):
    """Bytes of all storages that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            return result  # into what is known, or into host memory, which does not count
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor, once, as long as it lives."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._known.get(key)
        if known is None:
            weakref.finalize(storage, self._end, key)
        self.now += size - (known or 0)
        self._known[key] = size
        self.most = max(self.most, self.now)

    def _end(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


class _Kept:
    """A tensor that autograd keeps, until it lets go of it."""

    def __init__(self, saved: Saved, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._saved, self._key = saved, saved.enter(tensor)

    def __del__(self) -> None:
        self._saved.leave(self._key)


class Saved:
    """Bytes that autograd keeps at once, each storage once; parameters and logits do not count."""

    def __init__(self, ignored: set[int], columns: int) -> None:
        self.now = self.most = 0
        self._ignored, self._columns = ignored, columns
        self._held: dict[int, list[int]] = {}

    def enter(self, tensor: torch.Tensor) -> int:
        """Count a saved tensor; the key to leave with."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._ignored or tensor.shape[-1:] == (self._columns,):
            return 0
        held = self._held.setdefault(key, [0, storage.nbytes()])
        if held[0] == 0:
            self.now += held[1]
            self.most = max(self.most, self.now)
        held[0] += 1
        return key

    def leave(self, key: int) -> None:
        """The other end."""
        held = self._held.get(key)
        if held is None:
            return
        held[0] -= 1
        if held[0] == 0:
            self.now -= held[1]
            del self._held[key]

    def hooks(self) -> Any:
        """The context in which tensors are watched."""
        return torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Kept(self, tensor), lambda kept: kept.tensor)


def _mask_outside_modes(rows: int, columns: int) -> Any:
    """Attention's mask is a tensor subclass, which torch cannot make under a dispatch mode."""
    with _disable_current_modes():  # type: ignore[no-untyped-call]
        return causal_lower_right(rows, columns)


def _uncounted_host_buffer(device: torch.Tensor) -> torch.Tensor:
    """On a CPU, host memory for activations would count as the device's."""
    with _disable_current_modes():  # type: ignore[no-untyped-call]
        return torch.empty_like(device)


@contextmanager
def rank_of(mesh: Mesh, rank: int, virtual_pipeline: int) -> Iterator[None]:
    """This process as one rank of a mesh of which the others do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=mesh.world_size)
    enter_mesh(mesh, virtual_pipeline=virtual_pipeline)
    host_buffer = offload.host_buffer
    attention.causal_lower_right = _mask_outside_modes  # type: ignore[assignment]
    if not torch.cuda.is_available():
        offload.host_buffer = _uncounted_host_buffer
    try:
        yield
    finally:
        attention.causal_lower_right, offload.host_buffer = causal_lower_right, host_buffer
        leave_mesh()
        dist.destroy_process_group()


def measure(trial: Trial, stage: int, tokens: int = TOKENS) -> Bytes:
    """Bytes on the first rank of a pipeline stage in a step."""
    mesh = trial.mesh
    rank = stage * mesh.world_size // mesh.pipeline
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # of the layout before
    with rank_of(mesh, rank, trial.virtual_pipeline):
        live = Live()
        with live:
            lesson = _lesson(trial, mesh)
            engine = MegatronEngine(trial.model, trial.engine, OPTIM, mesh, micro_batch=trial.micro_batch)
        try:
            return _measure(engine, lesson, trial, tokens, live)
        finally:
            engine.close()


def _lesson(trial: Trial, mesh: Mesh) -> Lesson:
    if trial.taught == "no":
        return lambda batches: CrossEntropy()
    teacher = MegatronEngine(trial.model, trial.engine, None, mesh, micro_batch=trial.micro_batch)
    for parameter in teacher._sharded.parameters:
        torch.nn.init.normal_(parameter, std=0.02)
    return FromTeacher(teacher, Distillation(), trial.top_k)


def _measure(engine: MegatronEngine, lesson: Lesson, trial: Trial, tokens: int, live: Live) -> Bytes:
    parameters = list(engine._sharded.parameters)
    shards = [shard for adam in engine._adams for shard in adam.shards()]
    apart = trial.precision == "bf16"
    for tensor in parameters:
        torch.nn.init.normal_(tensor, std=0.02)
    saved = Saved({each.untyped_storage()._cdata for each in parameters}, MODEL.vocab_size // trial.tensor)
    batches = random_batches(MODEL, count=trial.micro_batches, rows=trial.micro_batch, tokens=tokens)
    on_gpu = torch.cuda.is_available()
    # Neighbours that do not exist send noise, and count no tokens: the engine looks at that when all is computed.
    with live, saved.hooks(), suppress(ValueError, FloatingPointError):
        engine.step(batches, lesson(batches), learning_rate=1e-4)
    return Bytes(
        weights=sum(each.nbytes for each in parameters),
        gradients=sum(buffer.grad_data.nbytes for model in engine._models for buffer in model.buffers),
        optimizer=sum(
            (each.main.nbytes if apart else 0) + sum(moment.nbytes for moment in each.moments.values())
            for each in shards
        ),
        saved=math.nan if trial.offload_activations else saved.most,
        peak=torch.cuda.max_memory_allocated() if on_gpu else live.most,
    )


def predicted(trial: Trial, stage: int, tokens: int = TOKENS) -> Bytes:
    """The planner's bytes of the same rank."""
    layout = layout_of(trial.engine, trial.training(tokens), data=trial.data)
    if not torch.cuda.is_available():
        layout = replace(layout, stack=replace(OURS, extra_saved=ON_CPU[trial.precision]))
    shape = shape_of(trial.model)
    teacher = None if trial.taught == "no" else Teacher(shape=shape, top_k=trial.top_k)
    told, kept = stage_memory(shape, layout, stage, teacher), kept_bytes(shape, layout, stage)
    masks = _mask_bytes(layout, stage, tokens, shape.layers)
    return Bytes(
        weights=told.weights,
        gradients=told.gradients,
        optimizer=told.optimizer,
        saved=kept.layers + masks + max(kept.head_norm, recomputed_bytes(shape, layout)),
        # On a GPU torch takes them from the allocator whose peak is measured.
        peak=told.peak - (0.0 if torch.cuda.is_available() else WORKSPACE_BYTES) + masks,
    )


def _mask_bytes(layout: Layout, stage: int, tokens: int, layers: int) -> float:
    """Masks that attention keeps on a CPU for the later of a context rank's two chunks; a fused kernel needs none."""
    if layout.context == 1 or torch.cuda.is_available():
        return 0.0
    per_layer = layout.element_bytes * tokens / (2 * layout.context) * tokens
    return chunks_in_flight(layout, stage) * layers / layout.pipeline / layout.virtual_pipeline * per_layer


def errors_of(trial: Trial, stage: int, tokens: int) -> tuple[dict[str, float], float]:
    """Per cent by which each prediction is off, and the measured peak in bytes."""
    found, told = measure(trial, stage, tokens), predicted(trial, stage, tokens)
    names = [field.name for field in fields(Bytes)]
    return {name: 100 * (getattr(told, name) / getattr(found, name) - 1) for name in names}, found.peak


def main() -> None:
    """Measure every layout and print predicted over measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens a sequence")
    parser.add_argument("--quick", action="store_true", help="two layouts, one of them with every axis")
    chosen = parser.parse_args()
    print(f"{'predicted over measured, %':78} stage weights  grads  optim  saved   peak   peak MiB")
    off: dict[str, list[float]] = {}
    for trial in QUICK if chosen.quick else TRIALS + TAUGHT:
        for stage in sorted({0, trial.pipeline - 1}):
            errors, peak = errors_of(trial, stage, chosen.tokens)
            for name, error in errors.items():
                off.setdefault(name, []).extend([] if math.isnan(error) else [error])
            cells = " ".join(f"{error:+6.1f}" for error in errors.values())
            print(f"{trial!s:78} {stage:5d} {cells} {peak / 2**20:10.1f}", flush=True)
    for name, errors in off.items():
        sizes = np.abs(errors)
        print(f"{name}: mean |error| {sizes.mean():.1f} %, worst {sizes.max():.1f} %")


if __name__ == "__main__":
    main()
