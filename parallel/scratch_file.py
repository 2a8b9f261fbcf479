"""Tensors in a file without a name on a local disk, of which a walk holds a few slices in memory.

The file is mapped: its tensors are read and written like any other, and what is touched becomes resident. A walk reads
the next slice while one is worked on, and writes the last one back and lets go of it, so that neither resident nor
unwritten memory grows with the file. What the kernel keeps of it in its page cache it gives up when memory is short.

The file has no name, so nothing is left behind however the process ends, and its space is taken when it is made: a disk
that is full is an error then, and not a signal at some later write to memory.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from conf.errors import UserError

SLICE_ELEMENTS = 2**22
"""Of each tensor; 16 MiB, a multiple of a page and of every vector width, so that slices give the bits of a whole."""
UNWRITTEN_SLICES = 2
POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE, Linux 5.14: read and map a range for writing, at once instead of page by page."""
WRITE_AND_WAIT = 0b111
"""SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE and _WAIT_AFTER."""


class ScratchFile:
    """Float32 tensors of one length, zero at first. Needs Linux.

    Args:
        directory: of a local disk; must exist.
        count: number of tensors.
        num_elements: of each of them, as `tensors` has them.

    Raises:
        UserError: the file cannot be made there, or the disk has too little space.
    """

    def __init__(self, directory: Path, *, count: int, num_elements: int) -> None:
        self._num_elements = num_elements
        self._stride = -(-4 * num_elements // mmap.PAGESIZE) * mmap.PAGESIZE
        size = max(count * self._stride, mmap.PAGESIZE)
        try:
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)
            os.posix_fallocate(self._file.fileno(), 0, size)
        except OSError as error:
            told = f"engine.offload_directory={directory}: cannot make a file of {size} bytes there: {error.strerror}."
            if error.errno == errno.ENOSPC:
                told += " Every rank of a node has one. Free space, or name a directory of another local disk."
            raise UserError(told) from error
        mapped = mmap.mmap(self._file.fileno(), size)
        self.tensors: list[Tensor] = [
            torch.frombuffer(mapped, dtype=torch.float32, count=num_elements, offset=index * self._stride)
            for index in range(count)
        ]
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        self._libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="scratch-file")

    def walk(self) -> Iterator[tuple[int, int]]:
        """Ranges [start, stop) of the elements, in order; those of all tensors are resident while one is worked on.

        Raises:
            OSError: the disk failed.
        """
        starts = range(0, self._num_elements, SLICE_ELEMENTS)
        slices = [(start, min(start + SLICE_ELEMENTS, self._num_elements)) for start in starts]
        coming: deque[Future[None]] = deque()
        going: deque[Future[None]] = deque()
        for index, current in enumerate(slices):
            if index == 0:
                coming.append(self._workers.submit(self._read, current))
            coming.popleft().result()
            coming.extend(self._workers.submit(self._read, following) for following in slices[index + 1 : index + 2])
            yield current
            going.append(self._workers.submit(self._write, current))
            if len(going) == UNWRITTEN_SLICES:
                going.popleft().result()
        for each in going:
            each.result()

    def _read(self, elements: tuple[int, int]) -> None:
        for _, address, size in self._places(elements):
            if self._libc.madvise(address, size, POPULATE_WRITE):
                if ctypes.get_errno() != errno.EINVAL:
                    raise _failure("read")
                self._libc.madvise(address, size, mmap.MADV_WILLNEED)

    def _write(self, elements: tuple[int, int]) -> None:
        for offset, address, size in self._places(elements):
            if self._libc.sync_file_range(self._file.fileno(), offset, size, WRITE_AND_WAIT):
                raise _failure("written")
            # Of a shared mapping this takes the pages from the process, and nothing from the file.
            self._libc.madvise(address, size, mmap.MADV_DONTNEED)

    def _places(self, elements: tuple[int, int]) -> Iterator[tuple[int, int, int]]:
        """Offset in the file, address and bytes of a range of each tensor."""
        start, stop = (4 * element for element in elements)
        for index, tensor in enumerate(self.tensors):
            yield index * self._stride + start, tensor.data_ptr() + start, stop - start


def _failure(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"optimizer state could not be {what}: {os.strerror(number)}")
