"""Adam in a file computes what it computes in memory, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from test_adam import OPTIM

from conf.errors import UserError
from parallel import scratch_file
from parallel.adam import make_adam, moments_of
from parallel.disk_adam import DiskAdam
from parallel.scratch_file import ScratchFile
from parallel.zero import GuardedAdam

PAGE_ELEMENTS = os.sysconf("SC_PAGE_SIZE") // 4
SIZE = 5 * PAGE_ELEMENTS + 3


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch_file, "SLICE_ELEMENTS", 2 * PAGE_ELEMENTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adam_in_a_file_is_adam_in_memory_to_the_last_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    values = torch.randn(SIZE, generator=random)
    there, here = (torch.nn.Parameter(values.clone()) for _ in range(2))
    on_disk = make_adam([there], OPTIM, partial(DiskAdam, directory=tmp_path, dtype=dtype))
    in_memory = make_adam([here], OPTIM, GuardedAdam)
    for each, flat in ((on_disk, there), (in_memory, here)):
        flat.grad = torch.zeros(SIZE)  # as DeepSpeed does, before it is asked for state
        each.make_state_of(flat)
        each.gradient_scale = 0.3
    for number in range(3):
        gradient = torch.randn(SIZE, generator=random)
        for flat in (there, here):
            assert flat.grad is not None
            flat.grad.copy_(gradient)
        on_disk.called_off = in_memory.called_off = number == 1
        on_disk.step()
        in_memory.step()
    assert torch.equal(on_disk.main_of(there), here)
    assert torch.equal(there, here.to(dtype))
    for name, moment in moments_of(in_memory, here).items():
        assert torch.equal(moments_of(on_disk, there)[name], moment)
    assert list(tmp_path.iterdir()) == []


def test_a_walk_keeps_a_few_slices_resident(tmp_path: Path) -> None:
    file = ScratchFile(tmp_path, count=3, num_elements=64 * PAGE_ELEMENTS)
    most = 0
    for _ in range(2):
        for number, (start, stop) in enumerate(file.walk()):
            for tensor in file.tensors:
                tensor[start:stop] += number
            most = max(most, _resident_pages(file))
    # One that is worked on, one that comes, and those that are written back, of three tensors.
    assert most <= 3 * 2 * (2 + scratch_file.UNWRITTEN_SLICES)
    assert _resident_pages(file) == 0
    expected = 2 * torch.arange(32.0).repeat_interleave(2 * PAGE_ELEMENTS)
    assert all(torch.equal(tensor, expected) for tensor in file.tensors)


def test_a_disk_without_space_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"cannot make a file of \d+ bytes there: No space left.*another local disk"):
        ScratchFile(tmp_path, count=3, num_elements=SIZE)
    with pytest.raises(UserError, match=r"engine\.offload_directory=.*/absent: .*No such file"):
        ScratchFile(tmp_path / "absent", count=3, num_elements=SIZE)


def _resident_pages(file: ScratchFile) -> int:
    address = file.tensors[0].data_ptr()
    blocks = Path("/proc/self/smaps").read_text().split("VmFlags")
    (block,) = (block for block in blocks if f"{address:x}-" in block)
    (size,) = (line.split()[1] for line in block.splitlines() if line.startswith("Rss:"))
    return int(size) * 1024 // (4 * PAGE_ELEMENTS)
