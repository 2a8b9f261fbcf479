"""Parquet and Arrow columns into numpy, by ways that import neither pandas nor the rest of Arrow."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq


def read_table(content: bytes | memoryview) -> pa.Table:
    """The table in the bytes of a parquet file.

    Raises:
        pyarrow.ArrowException, OSError: it is not parquet.
    """
    # Not pq.read_table, which imports pyarrow.dataset and with it pandas, where there is one: a second of start-up.
    return pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)


def numbers(column: pa.Array | pa.ChunkedArray) -> npt.NDArray[Any]:
    """The values of an integer column without gaps; read-only, not copied where they lie in one piece."""
    # Not to_numpy, which imports pandas where there is one: a quarter of a second of CPU in every process.
    array = column
    if isinstance(column, pa.ChunkedArray):
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    dtype = np.dtype(f"{'i' if pa.types.is_signed_integer(array.type) else 'u'}{array.type.bit_width // 8}")
    if not len(array):
        return np.empty(0, dtype)
    values = np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)
    values.flags.writeable = False
    return values
