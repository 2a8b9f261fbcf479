"""What keeping documents apart saves in attention: `python -m bench.packing [OVERRIDE...]`.

Rows of a recipe's own training text, at several lengths, go through attention forward and back: once as rows in which
everything sees everything before it, once with documents apart. Both take turns, and the table has the median of the
rounds: CPU seconds of the process on a CPU, elapsed seconds on a GPU. FLOPs are counted as `attended_length` does.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from conf import load
from conf.schema import RunConfig, TrainingStage
from data.batch import Batch, attended_length
from data.samples import StreamSpec
from data.shards import Dataset
from data.stream import Stream, mixtures_of
from parallel import device
from parallel.attention import attend_causally, attend_in_documents
from parallel.attention_kernel import attention_kernel
from parallel.documents import Documents
from recipes.driver import prepare_sources

NUM_ROWS = 4


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", default=[], help="as for python -m train; default recipe=foundation")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 4096], help="tokens of a row")
    parser.add_argument("--heads", type=int, nargs=3, default=[8, 2, 64], help="query heads, key-value heads, head dim")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    config = load.compose(given.overrides or ["recipe=foundation"])
    datasets = {name: Dataset.open(path) for name, path in prepare_sources(config).items()}
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    kernel = attention_kernel()
    print(f"{config.name}: joined by {kernel.name}; apart by {kernel.name_within_documents(dtype, given.heads[2])}")
    print(f"{torch.get_num_threads()} threads, {dtype}, heads {given.heads}, {NUM_ROWS} rows, {given.rounds} rounds\n")
    print("| tokens a row | documents a row | attention FLOPs left | joined s | apart s | time left |")
    print("| --- | --- | --- | --- | --- | --- |")
    for length in given.lengths:
        batches = rows_of(config, datasets, length)
        num_documents = sum(len(batch.cumulative_lengths) - 1 for batch in batches) / NUM_ROWS
        left = attended_length(batches) / length
        joined, apart = measure(batches, given.heads, dtype, given.rounds)
        cells = (f"{length:,}", f"{num_documents:.1f}", f"{100 * left:.0f} %", f"{joined:.3f}", f"{apart:.3f}")
        print("|", " | ".join([*cells, f"{100 * apart / joined:.0f} %"]), "|", flush=True)


def rows_of(config: RunConfig, datasets: Mapping[str, Dataset], length: int) -> list[Batch]:
    """Rows of the first stage that trains, one a batch, documents apart."""
    stages = [config.stages[name] for name in config.order]
    training = next(stage.training for stage in stages if isinstance(stage, TrainingStage))
    spec = StreamSpec(
        mixtures=mixtures_of(training),
        seed=config.seed,
        sequence_length=length,
        global_batch=NUM_ROWS,
        micro_batch=1,
        reset_at_documents=True,
    )
    return Stream(datasets, spec).batches(0, 0, 1)


def measure(batches: Sequence[Batch], heads: Sequence[int], dtype: torch.dtype, rounds: int) -> tuple[float, float]:
    """Median seconds of attention over all rows, forward and back: joined and apart."""
    num_heads, num_groups, dim = heads
    length, where = batches[0].tokens_BS.shape[1], device.this_device()
    torch.manual_seed(0)
    tensors = [
        torch.randn(length, 1, count, dim, device=where, dtype=dtype, requires_grad=True)
        for count in (num_heads, num_groups, num_groups)
    ]
    documents = [Documents(batch.position_ids_BS, (0,), 1).to(where) for batch in batches]
    kernel, scale = attention_kernel(), 1 / math.sqrt(dim)

    def joined(_: Documents) -> Tensor:
        return attend_causally(*(tensor.permute(1, 2, 0, 3) for tensor in tensors), scale, kernel)

    def apart(given: Documents) -> Tensor:
        return attend_in_documents(*tensors, given, scale, kernel)

    seconds: dict[Callable[[Documents], Tensor], list[float]] = {joined: [], apart: []}
    for _ in range(rounds + 1):
        for attend, times in seconds.items():
            started = clock()
            for each in documents:
                output = attend(each)
                torch.autograd.grad(output, tensors, torch.ones_like(output))
            times.append(clock() - started)
    return statistics.median(seconds[joined][1:]), statistics.median(seconds[apart][1:])


def clock() -> float:
    """CPU seconds of this process, or seconds when the GPU is done."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
