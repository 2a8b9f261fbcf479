"""Parquet and Arrow columns into numpy, by ways that import neither pandas nor the rest of Arrow."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard


def read_table(content: bytes) -> pa.Table:
    """The table in the bytes of a parquet file.

    Raises:
        pyarrow.ArrowException, OSError: it is not parquet.
    """
    # Not pq.read_table, which imports pyarrow.dataset and with it pandas, where there is one: a second of start-up.
    return pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)


def numbers(column: pa.Array | pa.ChunkedArray) -> npt.NDArray[Any]:
    """The values of an integer column without gaps; read-only, not copied where they lie in one piece."""
    # Not to_numpy, which imports pandas where there is one: a quarter of a second of CPU in every process.
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    dtype = np.dtype(f"{'i' if pa.types.is_signed_integer(array.type) else 'u'}{array.type.bit_width // 8}")
    if not len(array):
        return np.empty(0, dtype)
    values = np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)
    values.flags.writeable = False
    return values


def only_column(message: memoryview, dtype: npt.DTypeLike, count: int) -> npt.NDArray[Any]:
    """The values of a record batch of one integer column without gaps, compressed with zstd; read-only.

    Args:
        message: Arrow IPC: a marker, the length of the metadata, metadata, body. The only buffer of such a body is
            that of the values: their length in bytes, then a zstd frame, padded.
        dtype: of the values.
        count: how many there must be.

    Raises:
        ValueError, struct.error, zstandard.ZstdError: it is not such a message.
    """
    # Arrow itself would decode into memory of its own, with a copy of the message behind a schema before: a third more CPU.
    marker, metadata_bytes = struct.unpack_from("<Ii", message)
    (num_bytes,) = struct.unpack_from("<q", message, 8 + metadata_bytes)
    values = np.empty(count, dtype)
    if marker != 0xFFFFFFFF or num_bytes != values.nbytes:
        raise ValueError(f"{num_bytes} bytes, not {count} values of {values.dtype}")
    with zstandard.ZstdDecompressor().stream_reader(message[16 + metadata_bytes :]) as frame:
        if frame.readinto(values) != values.nbytes:
            raise ValueError(f"fewer than {count} values")
    values.flags.writeable = False
    return values
