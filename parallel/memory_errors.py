"""Out of memory, told with the part of the step it happened in and what was allocated."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from parallel.device import peak_memory_bytes

GIB = 2**30


class StepOutOfMemoryError(MemoryError):
    """A device had no memory left within a step.

    Attributes:
        part: of the step, e.g. `the forward and backward pass`.
        capacity_bytes: what the device has in all.
    """

    def __init__(self, part: str, message: str, capacity_bytes: int) -> None:
        super().__init__(message)
        self.part = part
        self.capacity_bytes = capacity_bytes

    def followed_by(self, text: str) -> StepOutOfMemoryError:
        """The same error with more lines."""
        return StepOutOfMemoryError(self.part, f"{self}\n{text}", self.capacity_bytes)


@contextmanager
def naming_memory_errors(part: str) -> Iterator[None]:
    """Say of memory errors in the block that they came in this part of the step.

    Raises:
        StepOutOfMemoryError: in place of what CUDA's or the CPU's allocator raises.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        held, capacity_bytes = _memory_of_device()
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        message = f"out of memory in {part}: {held}, of {capacity_bytes / GIB:.1f} GiB in all. {reason}"
        raise StepOutOfMemoryError(part, message, capacity_bytes) from error


def _is_out_of_memory(error: BaseException) -> bool:
    # The CPU's allocator has no exception of its own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _memory_of_device() -> tuple[str, int]:
    if torch.cuda.is_available():
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        held = (
            f"{allocated / GIB:.1f} GiB allocated, {reserved / GIB:.1f} GiB held by the allocator, "
            f"{peak_memory_bytes() / GIB:.1f} GiB allocated at most"
        )
        return held, torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{peak_memory_bytes() / GIB:.1f} GiB resident in this process at most", total
