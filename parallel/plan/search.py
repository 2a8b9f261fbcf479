"""The best layouts for a model on a number of GPUs: every layout is timed, and the front of time and memory remains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from heapq import heappop, heappush
from itertools import count, pairwise, product

from parallel.plan.divides import batch_multiple, divisors, pieces_of_sequence, tensor_sizes
from parallel.plan.hardware import Gpu
from parallel.plan.layout import MEGATRON, Layout, Offload, Precision, Recompute, Sharding, Stack
from parallel.plan.memory import GIB, StageMemory, stage_memory
from parallel.plan.shapes import Shape, Teacher
from parallel.plan.throughput import StepTime, step_time

WORTH_LISTING = 0.97
"""A slower layout is on the front if it needs at most this share of the memory of the one before it."""
Refusal = Callable[[Layout], str | None]
"""Why a layout must not be used, or None."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What is to be trained, and on what."""

    shape: Shape
    gpu: Gpu
    num_gpus: int
    global_batch: int
    sequence: int
    precisions: tuple[Precision, ...] = ("bf16",)
    engines: tuple[tuple[Stack, Sharding], ...] = ((MEGATRON, "zero1"),)
    offload: Offload = "none"
    offload_activations: bool = False
    micro_batches: tuple[int, ...] = (1, 2, 4, 8)
    recompute: tuple[Recompute, ...] = ("none", "full")
    """Least first. Selective recomputation is left out: fused attention has nothing of it to recompute in Megatron."""
    teacher: Teacher | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A layout with its time and its fullest stage."""

    layout: Layout
    step: StepTime
    worst: StageMemory

    def __str__(self) -> str:
        at = self.layout
        experts = f" expert {at.expert}" if at.expert > 1 else ""
        return (
            f"tensor {at.tensor} context {at.context} pipeline {at.pipeline} x {at.virtual_pipeline} data {at.data}"
            f"{experts} micro-batch {at.micro_batch} recompute {at.recompute} {at.precision}"
            f" {at.stack.name} {at.sharding}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Outcome of a search."""

    front: tuple[Candidate, ...]
    """Fastest first; each next one needs clearly less memory than all before it."""
    runner_up: Candidate | None
    """The second fastest that fits and is allowed, whether on the front or not."""
    considered: int
    refused: Counter[str]
    """Why layouts on the way to the front were refused -> how many."""
    leanest: StageMemory | None
    """The fullest stage of the layout that needs least of a GPU; None where none divides the GPUs and the batch."""


def search(task: Task, refuses: Refusal = lambda layout: None) -> Found:
    """The front of step time and memory over all layouts that fit and are not refused.

    `refuses` is asked only about layouts that would enter the front or be its runner-up, so it may be slow.
    """
    fitting, considered = [], 0
    leanest: StageMemory | None = None
    for layout in layouts(task):
        considered += 1
        worst = worst_stage(task.shape, layout, task.teacher)
        if leanest is None or worst.needed < leanest.needed:
            leanest = worst
        if worst.needed <= task.gpu.memory_bytes:
            fitting.append(Candidate(layout=layout, step=_step_of(task, layout), worst=worst))
    fitting.sort(key=_time_then_memory)
    front: list[Candidate] = []
    runner_up: Candidate | None = None
    refused: Counter[str] = Counter()
    for candidate in fitting:
        is_leaner = not front or candidate.worst.needed < WORTH_LISTING * front[-1].worst.needed
        if not is_leaner and runner_up is not None:
            continue
        reason = refuses(candidate.layout)
        if reason is not None:
            refused[reason] += 1
            continue
        if front and runner_up is None:
            runner_up = candidate
        if is_leaner:
            front.append(candidate)
    return Found(front=tuple(front), runner_up=runner_up, considered=considered, refused=refused, leanest=leanest)


def fastest(task: Task, refuses: Refusal = lambda layout: None) -> Candidate | None:
    """The first of the front alone, found in a fraction of the time; None where no layout fits and is allowed.

    What is recomputed must be no reason to refuse: a layout is looked at with the least recomputation that fits.
    """
    # Memory, and the time with more recomputation, are found only of layouts that come before the fastest that fits.
    more, number = dict(pairwise(task.recompute)), count()
    heap: list[tuple[float, float, int, Layout, StepTime, StageMemory | None]] = [
        (step.seconds, 0.0, next(number), layout, step, None) for layout, step in _fastest_first(task)
    ]
    while heap:
        seconds, _, _, layout, step, worst = heappop(heap)
        if worst is not None:
            if refuses(layout) is None:
                return Candidate(layout=layout, step=step, worst=worst)
            continue
        worst = worst_stage(task.shape, layout, task.teacher)
        if worst.needed <= task.gpu.memory_bytes:
            heappush(heap, (seconds, worst.needed, next(number), layout, step, worst))
        elif layout.recompute in more:
            layout = replace(layout, recompute=more[layout.recompute])
            step = _step_of(task, layout)
            heappush(heap, (step.seconds, 0.0, next(number), layout, step, None))
    return None


@lru_cache(maxsize=64)
def _fastest_first(task: Task) -> tuple[tuple[Layout, StepTime], ...]:
    """Layouts with the least recomputation; cached, as stages of a recipe often are one task."""
    least = layouts(replace(task, recompute=task.recompute[:1]))
    return tuple(sorted(((layout, _step_of(task, layout)) for layout in least), key=lambda timed: timed[1].seconds))


def _step_of(task: Task, layout: Layout) -> StepTime:
    return step_time(task.shape, layout, task.gpu, teacher=task.teacher)


def _time_then_memory(candidate: Candidate) -> tuple[float, float]:
    return candidate.step.seconds, candidate.worst.needed


def smallest_cluster(task: Task, refuses: Refusal = lambda layout: None, most: int = 2**15) -> int | None:
    """The fewest GPUs, in whole nodes, on which some layout fits; None where not even `most` do.

    Node counts tried are powers of two times a divisor of the layers, the ones that leave no GPU unused.
    """
    node = task.gpu.gpus_per_node
    counts = {node * size << power for size in divisors(task.shape.layers) for power in range(most.bit_length())}
    for num_gpus in sorted(total for total in counts if total <= most):
        at = replace(task, num_gpus=num_gpus)
        worst = ((layout, worst_stage(task.shape, layout, task.teacher)) for layout in layouts(at))
        fitting = (layout for layout, stage in worst if stage.needed <= task.gpu.memory_bytes)
        if any(refuses(layout) is None for layout in fitting):
            return num_gpus
    return None


def layouts(task: Task) -> Iterator[Layout]:
    """All layouts that divide the model, the batch and the GPUs."""
    for mesh in _meshes(task):
        for micro_batch in task.micro_batches:
            if task.global_batch % (mesh.data * micro_batch):
                continue
            at = replace(mesh, micro_batch=micro_batch)
            for chunks in _chunks(task.shape, at):
                for recompute, precision in product(task.recompute, task.precisions):
                    yield replace(at, virtual_pipeline=chunks, recompute=recompute, precision=precision)


def why(best: Candidate, other: Candidate) -> str:
    """Why `other` is slower than `best`, or what it buys, in words: the parts of the step that differ most."""
    slower = other.step.seconds / best.step.seconds - 1
    memory = (other.worst.needed - best.worst.needed) / GIB
    shares = {
        words: (getattr(other.step, name) - getattr(best.step, name)) / best.step.seconds
        for name, words in _PART_WORDS.items()
    }
    largest = sorted(shares.items(), key=lambda item: -abs(item[1]))[:3]
    told = ", ".join(f"{words} {100 * share:+.1f} %" for words, share in largest if abs(share) >= 0.0005)
    return f"{100 * slower:.1f} % slower ({told or 'no part stands out'}) and {memory:+.1f} GiB"


_PART_WORDS = {
    "matmul": "matrix products",
    "attention": "attention",
    "elementwise": "element-wise work",
    "launch": "launch gaps",
    "node_links": "tensor, context and expert traffic",
    "host_links": "activations to the host and back",
    "pipeline_links": "pipeline traffic",
    "bubble": "pipeline bubble",
    "data_links": "gradient and parameter exchange",
    "optimizer": "optimizer",
    "teacher": "the teacher",
}


def _meshes(task: Task) -> Iterator[Layout]:
    shape, node = task.shape, task.gpu.gpus_per_node
    tensors = tensor_sizes(shape.heads, shape.kv_heads, shape.ffn, shape.vocab, ranks_per_node=min(node, task.num_gpus))
    pipelines = divisors(shape.layers)
    for tensor in tensors:
        for context in (1, 2, 4, 8, 16):
            if task.sequence % pieces_of_sequence(context=context, tensor=tensor, sequence_parallel=tensor > 1):
                continue
            for pipeline in pipelines:
                data, left = divmod(task.num_gpus, tensor * context * pipeline)
                if left or task.global_batch % data:
                    continue
                for expert, (stack, sharding) in product(_experts(shape, data), task.engines):
                    yield Layout(
                        tensor=tensor,
                        context=context,
                        pipeline=pipeline,
                        data=data,
                        expert=expert,
                        global_batch=task.global_batch,
                        sequence=task.sequence,
                        stack=stack,
                        sharding=sharding,
                        offload=task.offload,
                        offload_activations=task.offload_activations,
                        sequence_parallel=tensor > 1,
                    )


def _experts(shape: Shape, data: int) -> Sequence[int]:
    return [size for size in divisors(shape.experts) if data % size == 0]


def _chunks(shape: Shape, layout: Layout) -> list[int]:
    per_stage = shape.layers // layout.pipeline
    rounds = batch_multiple(
        data=layout.data, micro_batch=layout.micro_batch, pipeline=layout.pipeline, virtual_pipeline=2
    )
    if layout.pipeline == 1 or layout.global_batch % rounds or not layout.stack.interleaves:
        return [1]
    return divisors(per_stage)


def worst_stage(shape: Shape, layout: Layout, teacher: Teacher | None = None) -> StageMemory:
    """Memory of the stage that needs most, and the most that any needs of the host."""
    # The first stage holds the most micro-batches, the last the logits; those between are under the first.
    stages = [stage_memory(shape, layout, stage, teacher) for stage in {0, layout.pipeline - 1}]
    worst = max(stages, key=lambda stage: stage.needed)
    return replace(worst, host_activations=max(stage.host_activations for stage in stages))
