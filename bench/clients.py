"""Which client reads objects with the least CPU: obstore, pyarrow's and boto3, whole objects and ranges of a block.

python -m bench.clients      starts a SeaweedFS of its own; CPU seconds are this process's, user and system
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

OBJECT_BYTES = 16 << 20
NUM_OBJECTS = 16
RANGE_BYTES = 280 << 10
NUM_RANGES = 500
NUM_THREADS = 4
ROUNDS = 3

Read = Callable[[str, int, int], int]
"""Name, start and length to the number of bytes that were read."""


def clients_of(endpoint: str, access_key: str, secret_key: str) -> dict[str, Read]:
    """Each client's way to read a range."""
    import boto3
    import obstore
    from botocore.config import Config
    from obstore.store import S3Store
    from pyarrow import fs

    store = S3Store(
        "data",
        endpoint=endpoint,
        access_key_id=access_key,
        secret_access_key=secret_key,
        region="us-east-1",
        client_options={"allow_http": True},
    )
    address = endpoint.removeprefix("http://")
    arrow = fs.S3FileSystem(
        access_key=access_key, secret_key=secret_key, endpoint_override=address, scheme="http", region="us-east-1"
    )
    boto = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        region_name="us-east-1",
        config=Config(max_pool_connections=NUM_THREADS),
    )
    for number in range(NUM_OBJECTS):
        obstore.put(store, f"object{number}", bytes(range(256)) * (OBJECT_BYTES // 256))

    def by_arrow(name: str, start: int, length: int) -> int:
        # Asks for the size first; there is no other way in from Python.
        with arrow.open_input_file(f"data/{name}") as file:
            return len(file.read_at(length, start))

    def by_boto(name: str, start: int, length: int) -> int:
        where = f"bytes={start}-{start + length - 1}"
        return len(boto.get_object(Bucket="data", Key=name, Range=where)["Body"].read())

    return {
        "obstore": lambda name, start, length: len(obstore.get_range(store, name, start=start, length=length)),
        "pyarrow": by_arrow,
        "boto3": by_boto,
    }


def measure(read: Read, length: int, count: int) -> tuple[float, float]:
    """Seconds and CPU seconds of so many reads, in threads."""
    step = (OBJECT_BYTES - length) // max(1, count)
    wanted = [(f"object{number % NUM_OBJECTS}", step * number, length) for number in range(count)]
    started, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        assert sum(pool.map(lambda each: read(*each), wanted)) == length * count
    return time.perf_counter() - started, time.process_time() - cpu


def main() -> None:
    """Measure in turns and print the best of the rounds."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import servers

    with tempfile.TemporaryDirectory() as folder, servers.seaweedfs(Path(folder)) as endpoint:
        clients = clients_of(endpoint, servers.ACCESS_KEY, servers.SECRET_KEY)
        best = {name: [float("inf")] * 4 for name in clients}
        for _ in range(ROUNDS):
            for name, read in clients.items():
                found = [*measure(read, OBJECT_BYTES, NUM_OBJECTS), *measure(read, RANGE_BYTES, NUM_RANGES)]
                best[name] = [min(pair) for pair in zip(best[name], found, strict=True)]
    print("| | MiB/s whole | CPU-s/GiB whole | ranges/s | CPU ms a range |\n| --- | --- | --- | --- | --- |")
    size = OBJECT_BYTES * NUM_OBJECTS / (1 << 20)
    for name, (whole, whole_cpu, ranges, ranges_cpu) in best.items():
        cells = f"{size / whole:.0f} | {whole_cpu / size * 1024:.2f} | {NUM_RANGES / ranges:.0f}"
        print(f"| {name} | {cells} | {ranges_cpu / NUM_RANGES * 1e3:.2f} |")


if __name__ == "__main__":
    main()
