"""Where the time of a step goes, by kind of kernel, from torch's profiler."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

# In this order: the first that matches counts.
KINDS = {
    "attention": r"flash|fmha|attention|sdpa|cudnn.*(fprop|bprop)",
    "matrix product": r"gemm|mkldnn|cutlass|nvjet|cublas|xmma|aten::(add)?mm|aten::(b|_scaled_)mm|grouped_mm",
    "communication": r"nccl|gloo|c10d",
    "optimizer": r"adam",
    "element-wise": r"",
}


def kernel_table(step: Callable[[], object], *, trace: Path | None = None) -> str:
    """Profile one step.

    Args:
        step: taken once before, unseen, and once under the profiler.
        trace: where to write a trace for chrome://tracing or Perfetto.

    Returns:
        A Markdown table: milliseconds and share of the device's time for each kind of kernel (of operation on a CPU).
    """
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    step()
    with profile(activities=activities) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    spent: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu and is_kernel:
            spent[kind_of(event.key)] += event.self_device_time_total
        elif not on_gpu:
            spent[kind_of(event.key)] += event.self_cpu_time_total
    total = sum(spent.values()) or 1.0
    rows = [f"| {kind} | {us / 1e3:.1f} | {100 * us / total:.0f} % |" for kind, us in sorted(spent.items(), key=_spent)]
    return "\n".join(["| kind of kernel | ms | share |", "| --- | --- | --- |", *rows])


def kind_of(name: str) -> str:
    """The kind of a kernel or operation by its name.

    >>> [kind_of(name) for name in ("nvjet_tst_128x256", "cudnn_generated_fort_native_sdpa_sm90_flash_bprop", "mul")]
    ['matrix product', 'attention', 'element-wise']
    """
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))


def _spent(item: tuple[str, float]) -> float:
    return -item[1]
