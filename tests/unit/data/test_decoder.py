from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from data.decoder import Decoder


def message(values: pa.Array, compression: str | None = "zstd") -> memoryview:
    """A record batch as it lies in a shard."""
    batch = pa.record_batch([values], names=["tokens"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as stream:
        stream.write_batch(batch)
    return memoryview(sink.getvalue().to_pybytes())[batch.schema.serialize().size :]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_memory_is_used_again_only_when_nobody_sees_it(dtype: type) -> None:
    random = np.random.default_rng(1)
    blocks = [random.integers(0, 60_000, 500 + number).astype(dtype) for number in range(20)]
    decoder = Decoder(520, dtype)
    views: list[memoryview] = []
    places = set()
    for block in blocks:
        values = decoder.decode(message(pa.array(block)), len(block))
        assert np.array_equal(values, block)
        assert not values.flags.writeable
        places.add(values.ctypes.data)
        # A view of a view outlives the array that was handed out.
        if len(block) % 2:
            views.append(memoryview(values[100:][:50])[10:])
        del values
    for view, block in zip(views, blocks[1::2], strict=True):
        assert np.array_equal(np.asarray(view), block[110:150])
    assert len(places) == len(views) == 10


@pytest.mark.parametrize(
    "stored",
    [
        message(pa.array([1, 2, None, 4], pa.uint16())),
        message(pa.array([1, 2, 3, 4], pa.uint32())),
        message(pa.array([1, 2, 3], pa.uint16())),
        message(pa.array([1, 2, 3, 4], pa.uint16()), "lz4"),
        message(pa.array([1, 2, 3, 4], pa.uint16()), None),
        message(pa.array([1, 2, 3, 4], pa.uint16()))[:-20],
        memoryview(b"short"),
    ],
    ids=["null", "type", "fewer", "codec", "plain", "cut", "short"],
)
def test_what_is_no_block_of_so_many_tokens_is_refused(stored: memoryview) -> None:
    with pytest.raises(ValueError, match=r"."):
        Decoder(8, np.uint16).decode(stored, 4)
