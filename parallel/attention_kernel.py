"""Which kernel computes attention, by the GPU and what is installed.

A rule and not a timing at the start, so that a run that continues on the same machines computes the same to the last
bit. One H100, 32/8 heads of 128, causal, 8,192 tokens, TFLOP/s forward / backward: cuDNN 626 / 498, FlashAttention-2
337 / 289, and cuDNN made the whole step 12 % faster. FlashAttention-3 and -4 were not measured here; somebody who
installed one for this generation of GPU gets it. `python -m bench.step` shows whether that is right.

Where rows keep documents apart, only FlashAttention has a kernel that is told where they begin (torch's cuDNN has none
for shared key-value heads); it computes the squares of the documents and not that of the row.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn.attention import SDPBackend, activate_flash_attention_impl

AMPERE, HOPPER, BLACKWELL = 8, 9, 10
FALLBACKS = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
HALF = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 256
# Implementation by torch's name, package that brings it, generation it is written for.
FLASH_IMPLEMENTATIONS = (("FA3", "flash_attn_interface", HOPPER), ("FA4", "flash_attn.cute", BLACKWELL))


@dataclass(frozen=True, slots=True)
class Kernel:
    """How torch's attention is told to compute.

    Attributes:
        name: for the log.
        order: backends to be tried; empty leaves it to torch.
        flash: the implementation of FlashAttention that torch must be switched to, by its name there.
        has_lengths: FlashAttention can be told where documents begin; the one of torch, where `flash` names no other.
    """

    name: str
    order: tuple[SDPBackend, ...] = ()
    flash: str | None = None
    has_lengths: bool = False

    def takes_lengths(self, dtype: torch.dtype, head_dim: int) -> bool:
        """Whether documents apart are one call of FlashAttention; otherwise they are attended to one after another."""
        return self.has_lengths and dtype in HALF and head_dim % 8 == 0 and head_dim <= LARGEST_HEAD

    def name_within_documents(self, dtype: torch.dtype, head_dim: int) -> str:
        """For the log, where rows keep documents apart."""
        if self.takes_lengths(dtype, head_dim):
            return f"{self.flash or 'FlashAttention-2'} with lengths of documents"
        return f"{self.name}, document by document"


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
            order = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, *FALLBACKS)
            return Kernel(name, order, name, has_lengths=True)
    kernel = CUDNN if generation in (HOPPER, BLACKWELL) else TORCH_DECIDES
    return replace(kernel, has_lengths=generation is not None and generation >= AMPERE)


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
