"""Memory that runs out is told with the part of the step; other errors pass."""

from __future__ import annotations

import pytest
import torch

from parallel.memory_errors import StepOutOfMemoryError, naming_memory_errors


def test_allocator_that_has_no_memory_is_named_with_the_part_of_the_step():
    with pytest.raises(StepOutOfMemoryError) as raised, naming_memory_errors("the optimizer's update"):
        torch.empty(2**60, dtype=torch.uint8)
    error = raised.value
    assert error.part == "the optimizer's update"
    assert error.capacity_bytes > 2**30
    for words in (
        "out of memory in the optimizer's update",
        "GiB resident in this process",
        "1152921504606846976 bytes",
    ):
        assert words in str(error)
    longer = error.followed_by("Would fit:")
    assert str(longer) == f"{error}\nWould fit:" and longer.part == error.part


def test_cuda_allocator_has_an_exception_of_its_own():
    with pytest.raises(StepOutOfMemoryError, match="CUDA out of memory"), naming_memory_errors("the backward pass"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), naming_memory_errors("the backward pass"):
        raise RuntimeError("shapes differ")
