"""What S3 alone can do: storage classes, and bringing archived objects back."""

from __future__ import annotations

import functools
import re
import sys
import threading
from typing import Any, Literal
from urllib.parse import urlsplit

from conf.errors import DataError
from conf.schema import StorageConfig

ARCHIVE_CLASSES = ("GLACIER", "DEEP_ARCHIVE")
POLL_SECONDS = 60.0

Retrieval = Literal["Bulk", "Standard"]
State = Literal["readable", "archived", "thawing"]


class Archive:
    """The archive side of a dataset in S3.

    Args:
        location: `s3://BUCKET/FOLDER` of the dataset.
        storage: how the storage is spoken to.
        retrieval: Bulk is cheapest, Standard faster.
        days: that a restored copy is kept.
        poll_seconds: how often `wait` looks.
    """

    def __init__(
        self,
        location: str,
        storage: StorageConfig,
        *,
        retrieval: Retrieval = "Bulk",
        days: int = 7,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self._location = location.rstrip("/")
        parts = urlsplit(self._location)
        self._bucket, self._folder = parts.netloc, parts.path.strip("/")
        self._storage = storage
        self._retrieval = retrieval
        self._days = days
        self._poll_seconds = poll_seconds
        self._asked: set[str] = set()
        self._lock = threading.Lock()

    def archived(self, folder: str) -> set[str]:
        """Names below a folder of the dataset that are in an archive class, restored for the moment or not.

        Raises:
            DataError: the storage refuses.
        """
        pages = self._client.get_paginator("list_objects_v2")
        prefix = "/".join(filter(None, [self._folder, folder])) + "/"
        try:
            return {
                entry["Key"].removeprefix(f"{self._folder}/")
                for page in pages.paginate(Bucket=self._bucket, Prefix=prefix)
                for entry in page.get("Contents", [])
                if entry.get("StorageClass") in ARCHIVE_CLASSES
            }
        except _client_errors() as error:
            raise DataError(f"{self._location}/{folder}: cannot be listed ({error}).") from error

    def state(self, name: str) -> State:
        """Whether an object can be read, by one request.

        Raises:
            DataError: the storage refuses.
        """
        try:
            head = self._client.head_object(Bucket=self._bucket, Key=self._key(name))
        except _client_errors() as error:
            raise DataError(f"{self._location}/{name}: cannot be looked up ({error}).") from error
        if head.get("StorageClass") not in ARCHIVE_CLASSES:
            return "readable"
        restore = head.get("Restore", "")
        if not restore:
            return "archived"
        return "thawing" if re.search(r'ongoing-request="true"', restore) else "readable"

    def request(self, name: str) -> None:
        """Ask for an object to be restored; asking again changes nothing.

        Raises:
            DataError: restoring is not allowed, or the storage refuses.
        """
        job = {"Days": self._days, "GlacierJobParameters": {"Tier": self._retrieval}}
        try:
            self._client.restore_object(Bucket=self._bucket, Key=self._key(name), RestoreRequest=job)
        except _client_errors() as error:
            code = getattr(error, "response", {}).get("Error", {}).get("Code", "")
            if code == "RestoreAlreadyInProgress":
                return
            if code in ("AccessDenied", "403"):
                raise DataError(
                    f"{self._location}/{name}: is archived and may not be restored by these credentials. They need "
                    "s3:RestoreObject, or somebody else runs python -m data.thaw."
                ) from error
            raise DataError(f"{self._location}/{name}: cannot be restored ({error}).") from error

    def ask(self, name: str) -> None:
        """Ask for an object that was met archived, unless this was done before; returns at once.

        Raises:
            DataError: restoring is not allowed, or the storage refuses.
        """
        with self._lock:
            if name in self._asked:
                return
            self._asked.add(name)
        if self.state(name) == "archived":
            self.request(name)
            print(f"{self._location}/{name} is archived and was asked for ({self._retrieval})", file=sys.stderr)

    def wait(self, name: str, given_up: threading.Event) -> bool:
        """Ask for an object and return when it can be read, however long that takes, or when it is given up.

        Returns:
            Whether it can be read.

        Raises:
            DataError: restoring is not allowed, or the storage refuses.
        """
        while True:
            match self.state(name):
                case "readable":
                    return True
                case "archived":
                    # Never asked for, or the restored copy has ended since.
                    self.request(name)
            if given_up.wait(self._poll_seconds):
                return False

    @functools.cached_property
    def _client(self) -> Any:
        return _client(self._storage)

    def _key(self, name: str) -> str:
        return f"{self._folder}/{name}" if self._folder else name


def _client(storage: StorageConfig) -> Any:
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=5, read_timeout=storage.request_seconds, retries={"mode": "adaptive", "max_attempts": 8}
    )
    return boto3.client("s3", endpoint_url=storage.endpoint, region_name=storage.region, config=config)


def _client_errors() -> tuple[type[Exception], ...]:
    from botocore.exceptions import BotoCoreError, ClientError

    return BotoCoreError, ClientError
