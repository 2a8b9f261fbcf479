"""Memory that is used again: what blocks come and go in costs as much to fault in as to read or decode into."""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np
import numpy.typing as npt


class Rooms:
    """Memory for arrays of up to `num_bytes` each; for use by several threads.

    That of an array is given out again when nobody holds a view of it any more, and never given back to the system.
    """

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._free: deque[npt.NDArray[np.uint8]] = deque()

    def array(self, count: int, dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
        """Room for `count` values of a type, at most `num_bytes`; what it holds is not defined."""
        try:
            room = self._free.pop()
        except IndexError:
            room = np.empty(self._num_bytes, np.uint8)
        # Through a memoryview, so that views of the array refer to the array and not to its room.
        array = np.frombuffer(room.data, dtype, count)
        weakref.finalize(array, self._free.append, room).atexit = False
        return array
