"""A training step of one model, ours beside others': `python -m bench.step`, on one GPU, or small on a CPU.

On a GPU: Llama-3-8B's layer, 8 layers, 8,192 tokens, a vocabulary of 32k, 8 micro-batches a step, optimizer included,
one contender after the other. On a CPU: a small model in float32 on one core, the contenders taking turns step by step,
in seconds that the core was theirs, so that ratios hold on a busy machine. Prints medians, TFLOP/s (causal attention
counted half), the ratio to ours (compiled to compiled, not compiled to not compiled) and to the product of matrices
measured in the same run, memory, and where our step's time goes.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from bench.kernels import kernel_table
from bench.peers import (
    BATCHES,
    DEVICE,
    DTYPE,
    ENGINE,
    NUM_MICRO_BATCHES,
    ON_GPU,
    SHAPE,
    Step,
    hugging_face,
    megatron,
    torchtitan,
)
from bench.settings import OPTIM
from parallel import groups
from parallel.engine import make_engine
from parallel.loss import CrossEntropy
from parallel.mesh import Mesh

NOT_COMPILED = "ours, not compiled"
UNCOMPILED = (NOT_COMPILED, "megatron-core, our attention", "megatron-core as shipped", "Hugging Face")
"""On a CPU, where they are held against ours as it is without compilation."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a contender reached."""

    name: str
    seconds: list[float]
    loss: float
    memory_bytes: int | None

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)

    def over(self, other: Result) -> float:
        """How many times as long as another it takes, by the median of pairs of steps."""
        return statistics.median(mine / its for mine, its in zip(self.seconds, other.seconds, strict=True))


class DrawnOnDevice:
    """Normal weights. Implements `TensorSource`: `InitialWeights` of a model for a GPU take a CPU half a minute."""

    def read(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """See `TensorSource.read`; on the device."""
        return torch.ones(shape) if len(shape) == 1 else SHAPE.init_std * torch.randn(shape, device=DEVICE)


def ours(**changes: Any) -> Step:
    """Our engine."""
    engine = make_engine(SHAPE, replace(ENGINE, **changes), OPTIM, Mesh(), micro_batch=1)
    torch.manual_seed(0)  # variants of ours start alike
    engine.load_weights(DrawnOnDevice())
    given, objective = BATCHES, CrossEntropy()
    return lambda: engine.step(given, objective, learning_rate=OPTIM.learning_rate).loss


def contenders() -> dict[str, Callable[[], Step]]:
    """What is compared on this machine, by name."""
    found: dict[str, Callable[[], Step]] = {
        "ours": partial(ours, compile=True),
        **({} if ON_GPU else {NOT_COMPILED: ours}),
        "megatron-core, our attention": partial(megatron, attention="ours", compiled=ON_GPU),
        "megatron-core as shipped": partial(megatron, attention="its own"),
        "Hugging Face": partial(hugging_face, compiled=False),
        "Hugging Face compiled": partial(hugging_face, compiled=True),
    }
    if importlib.util.find_spec("torchtitan") is not None:
        found["torchtitan"] = partial(torchtitan, compiled=True)
    if ON_GPU:
        found["ours fp8"] = partial(ours, compile=True, precision="fp8")
        found["ours fp8_rowwise"] = partial(ours, compile=True, precision="fp8_rowwise")
    return found


def time_step(step: Step) -> float:
    """Seconds of a step, with the device idle before and after; on a CPU of its one core, whoever else is on it."""
    clock = time.perf_counter if ON_GPU else time.process_time
    synchronise()
    started = clock()
    step()
    synchronise()
    return clock() - started


def synchronise() -> None:
    """Wait for the GPU, where there is one."""
    if ON_GPU:
        torch.cuda.synchronize()


def matmul_ceiling() -> float:
    """FLOP/s of a large product of matrices in the step's dtype."""
    rows, inner, columns = (8192, 8192, 8192) if ON_GPU else (1024, 1024, 1024)
    left = torch.randn(rows, inner, device=DEVICE, dtype=DTYPE)
    right = torch.randn(inner, columns, device=DEVICE, dtype=DTYPE)
    seconds = min(time_step(lambda: float((left @ right)[0, 0])) for _ in range(20))
    return 2.0 * rows * inner * columns / seconds


def one_after_the_other(names: Sequence[str], num_steps: int) -> Iterator[Result]:
    """For a GPU, which has memory for one. One that fails, as a peer may that does not fit, is told and left out."""
    for name in names:
        torch._dynamo.reset()
        gc.collect()  # hooks and parameters of the one before refer to each other
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            yield _alone(name, num_steps)
        except Exception as error:
            print(f"| {name} | failed: {type(error).__name__}: {str(error).strip().splitlines()[:1]} |", flush=True)


def _alone(name: str, num_steps: int) -> Result:
    step = contenders()[name]()
    loss = step()
    step()
    seconds = [time_step(step) for _ in range(num_steps)]
    memory_bytes = torch.cuda.max_memory_allocated()
    if name == "ours":
        print(kernel_table(step))
    return Result(name=name, seconds=seconds, loss=loss, memory_bytes=memory_bytes)


def taking_turns(names: Sequence[str], num_steps: int) -> Iterator[Result]:
    """For a CPU: each round is a step of every contender, in turning order."""
    steps = {name: contenders()[name]() for name in names}
    losses = {name: step() for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(num_steps):
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            seconds[name].append(time_step(steps[name]))
    print(kernel_table(steps["ours"]))
    for name in names:
        yield Result(name=name, seconds=seconds[name], loss=losses[name], memory_bytes=None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--only", nargs="*", default=list(contenders()), choices=list(contenders()), metavar="NAME")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1 if not ON_GPU else torch.get_num_threads())
    groups.open_world(groups.host_store(), rank=0, world_size=1)
    groups.enter_mesh(Mesh())
    print(f"device {torch.cuda.get_device_name() if ON_GPU else 'CPU, one core'}, {DTYPE}, torch {torch.__version__}")
    ceiling = matmul_ceiling()
    print(f"product of matrices {ceiling / 1e12:.3g} TFLOP/s")
    if importlib.util.find_spec("torchtitan") is None:
        print("torchtitan: not installed: pip install torchtitan")
    tokens = NUM_MICRO_BATCHES * SHAPE.max_sequence_length
    flops = tokens * SHAPE.train_flops_per_token(SHAPE.max_sequence_length)
    found: dict[str, Result] = {}
    for result in (one_after_the_other if ON_GPU else taking_turns)(given.only, given.steps):
        if not found:
            print("| | ms a step | to ours alike, paired | tokens/s | TFLOP/s | of the product | memory GiB | loss |")
            print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        found[result.name] = result
        alike = NOT_COMPILED if result.name in UNCOMPILED else "ours"
        paired = result.over(found.get(alike, next(iter(found.values()))))
        rate = flops / result.median
        memory = "-" if result.memory_bytes is None else f"{result.memory_bytes / 2**30:.1f}"
        print(
            f"| {result.name} | {1e3 * result.median:.0f} | {paired:.2f} | {tokens / result.median:,.0f} "
            f"| {rate / 1e12:.3g} | {100 * rate / ceiling:.0f} % | {memory} | {result.loss:.3f} |",
            flush=True,
        )
    groups.shut_down()


if __name__ == "__main__":
    main()
