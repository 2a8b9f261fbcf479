"""Which kernel computes attention, by the GPU and what is installed.

A rule and not a timing at the start, so that a run that continues on the same machines computes the same to the last
bit. One H100, 32/8 heads of 128, causal, 8,192 tokens, TFLOP/s forward / backward: cuDNN 626 / 498, FlashAttention-2
337 / 289, and cuDNN made the whole step 12 % faster. FlashAttention-3 and -4 were not measured here; somebody who
installed one for this generation of GPU gets it. `python -m bench.step` shows whether that is right.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, activate_flash_attention_impl

HOPPER, BLACKWELL = 9, 10
FALLBACKS = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
# Implementation by torch's name, package that brings it, generation it is written for.
FLASH_IMPLEMENTATIONS = (("FA3", "flash_attn_interface", HOPPER), ("FA4", "flash_attn.cute", BLACKWELL))


@dataclass(frozen=True, slots=True)
class Kernel:
    """How torch's attention is told to compute.

    Attributes:
        name: for the log.
        order: backends to be tried; empty leaves it to torch.
        flash: the implementation of FlashAttention that torch must be switched to, by its name there.
    """

    name: str
    order: tuple[SDPBackend, ...] = ()
    flash: str | None = None


TORCH_DECIDES = Kernel("torch's own choice")
CUDNN = Kernel("cuDNN", (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *FALLBACKS))


def kernel_for(generation: int | None, is_installed: Callable[[str], bool]) -> Kernel:
    """The rule.

    Args:
        generation: major compute capability of the GPU; None for a CPU.
        is_installed: whether a package can be imported.
    """
    for name, package, written_for in FLASH_IMPLEMENTATIONS:
        if generation == written_for and is_installed(package):
            return Kernel(name, (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, *FALLBACKS), name)
    return CUDNN if generation in (HOPPER, BLACKWELL) else TORCH_DECIDES


@functools.cache
def attention_kernel() -> Kernel:
    """The kernel of this process, switched on."""
    generation = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else None
    kernel = kernel_for(generation, _is_installed)
    if kernel.flash is not None:
        activate_flash_attention_impl(kernel.flash)
    return kernel


def _is_installed(package: str) -> bool:
    parent, _, _ = package.rpartition(".")
    return (not parent or _is_installed(parent)) and importlib.util.find_spec(package) is not None
