"""Which device a rank computes on, and what it can do."""

from __future__ import annotations

import resource

import torch

# Dense bf16 FLOP/s from NVIDIA's data sheets (without sparsity), by the name torch gives.
PEAK_BF16_FLOPS = {
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
}


def this_device() -> torch.device:
    """The device of this rank: its current CUDA device, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def select_device(rank: int) -> None:
    """Take this rank's GPU, where there are any; ranks of a node are consecutive and as many as the GPUs it shows."""
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())


def communication_backend() -> str:
    """Name of the torch.distributed backend for tensors on this rank's device."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def peak_flops() -> float | None:
    """Dense bf16 FLOP/s of this rank's GPU; None on a CPU or a GPU that is not in the table."""
    if not torch.cuda.is_available():
        return None
    return PEAK_BF16_FLOPS.get(torch.cuda.get_device_name())


def peak_memory_bytes() -> int:
    """Largest device memory allocated since the start; on a CPU the largest resident set of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
