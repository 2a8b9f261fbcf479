"""Real servers for tests and benches, on free loopback ports; they end with the process that started them."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ACCESS_KEY = "AKTEST"
SECRET_KEY = "SKTEST"
PATIENCE_SECONDS = 40.0


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, below those the kernel hands out and low enough to leave room for +10000."""
    ports: list[int] = []
    start = 11000 + os.getpid() * 37 % 9000
    for port in range(start, start + 4000):
        with socket.socket() as probe, socket.socket() as far:
            try:
                probe.bind(("127.0.0.1", port))
                far.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError("no free ports")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@contextmanager
def running(command: list[str], folder: Path, is_ready: Callable[[], bool]) -> Iterator[subprocess.Popen[bytes]]:
    """A server until the block ends; its output is `folder/log`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, start_new_session=True, preexec_fn=_die_with_parent
        )
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} did not start: {(folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


def listens(port: int) -> bool:
    """Whether somebody accepts connections."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def program(name: str) -> str | None:
    """Where a program is, the scripts of this interpreter included."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


@contextmanager
def seaweedfs(folder: Path) -> Iterator[str]:
    """An S3 server that checks signatures; yields its endpoint."""
    weed = program("weed")
    assert weed is not None
    folder.mkdir(parents=True, exist_ok=True)
    identities = folder / "identities.json"
    owner = {
        "name": "owner",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    keys = {"default_provider": "local", "providers": {"local": {"type": "local", "enableOnDemandCreate": True}}}
    identities.write_text(json.dumps({"identities": [owner], "kms": keys}))
    (folder / "volumes").mkdir(exist_ok=True)
    master, volume, filer, s3 = free_ports(4)
    command = [weed, "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder / 'volumes'}", "-volume.max=200"]
    command += [
        f"-master.port={master}",
        f"-volume.port={volume}",
        f"-filer.port={filer}",
        "-master.electionTimeout=1s",
    ]
    command += ["-filer", "-s3", f"-s3.port={s3}", f"-s3.config={identities}", "-s3.port.iceberg=0"]
    command += ["-s3.port.lance=0", "-master.volumeSizeLimitMB=1024", "-master.volumePreallocate=false"]
    endpoint = f"http://127.0.0.1:{s3}"

    def is_ready() -> bool:
        if not listens(s3):
            return False
        import boto3
        from botocore.config import Config

        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            config=Config(retries={"max_attempts": 1}, connect_timeout=2, read_timeout=5),
        )
        try:
            if not client.list_buckets()["Buckets"]:
                client.create_bucket(Bucket="data")
            client.put_object(Bucket="data", Key=".ready", Body=b"x")
        except Exception:
            return False
        return True

    with running(command, folder, is_ready):
        yield endpoint


@contextmanager
def moto(folder: Path) -> Iterator[str]:
    """An S3 server that archives and restores, and does not look at signatures; yields its endpoint."""
    (port,) = free_ports(1)
    server = program("moto_server")
    assert server is not None
    with running([server, "-H", "127.0.0.1", "-p", str(port)], folder, lambda: listens(port)):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def redis(
    folder: Path, port: int | None = None, *, cluster: bool = False
) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A Redis of at most 64 MiB; yields its port and its process."""
    server = program("redis-server")
    assert server is not None
    port = port or free_ports(1)[0]
    command = [server, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    command += ["--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru"]
    if cluster:
        command += ["--cluster-enabled", "yes", "--cluster-config-file", f"nodes-{port}.conf"]
    folder.mkdir(parents=True, exist_ok=True)
    with running(command, folder, lambda: listens(port)) as process:
        yield port, process
