"""Blocks out of the bytes they are stored as, into memory that is used again."""

from __future__ import annotations

import struct
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from data.rooms import Rooms

MARKER = 0xFFFFFFFF


class Decoder:
    """Decodes blocks of up to `size` values; for use by several threads.

    Arrow would decode into memory of its own, that of blocks that come and go; it costs half as much to fault in as to
    decode into.
    """

    def __init__(self, size: int, dtype: npt.DTypeLike) -> None:
        self._dtype = np.dtype(dtype)
        self._rooms = Rooms(size * self._dtype.itemsize)
        self._local = threading.local()

    def decode(self, message: memoryview, count: int) -> npt.NDArray[Any]:
        """The values of a record batch of one integer column without gaps, compressed with zstd.

        Args:
            message: Arrow IPC: a marker, the length of the metadata, metadata, body. The only buffer of such a body is
                that of the values: their length in bytes, then a zstd frame, padded.
            count: how many values there must be, at most `size`.

        Returns:
            Read-only, shape (count,).

        Raises:
            ValueError: it is not such a message.
        """
        try:
            marker, metadata_bytes = struct.unpack_from("<Ii", message)
            (num_bytes,) = struct.unpack_from("<q", message, 8 + metadata_bytes)
            if marker != MARKER or num_bytes != count * self._dtype.itemsize:
                raise ValueError(f"{num_bytes} bytes, not {count} values of {self._dtype}")
            values = self._rooms.array(count, self._dtype)
            with self._decompressor().stream_reader(message[16 + metadata_bytes :]) as frame:
                if frame.readinto(values) != num_bytes:
                    raise ValueError(f"fewer than {count} values")
        except (struct.error, zstandard.ZstdError) as error:
            raise ValueError(str(error)) from error
        values.flags.writeable = False
        return values

    def _decompressor(self) -> zstandard.ZstdDecompressor:
        """The thread's own."""
        if not hasattr(self._local, "decompressor"):
            self._local.decompressor = zstandard.ZstdDecompressor()
        decompressor: zstandard.ZstdDecompressor = self._local.decompressor
        return decompressor
