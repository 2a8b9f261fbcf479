"""A folder of objects: a local path, `s3://` at any endpoint, `gs://` or `az://`; the same few verbs for all of them.

What S3 alone can do (storage classes, restoring) is in `archive.py`. Every request has a time-out, is tried again while
a budget of time lasts, and ends in an error that names the object.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from conf.errors import DataError
from conf.schema import StorageConfig
from data.backends import ArchivedObjectError, Backend, MissingObjectError, RetryableError
from data.files import Files
from data.objects import Objects
from data.retry import Backoff

__all__ = ["SCHEMES", "ArchivedObjectError", "MissingObjectError", "Store", "StoreCounters"]

SCHEMES = ("file", "s3", "gs", "az")

T = TypeVar("T")


@dataclass(slots=True)
class StoreCounters:
    """What was asked of a store so far."""

    requests: int = 0
    bytes_read: int = 0
    retries: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, *, requests: int = 0, bytes_read: int = 0, retries: int = 0) -> None:
        """Count, from any thread."""
        with self.lock:
            self.requests += requests
            self.bytes_read += bytes_read
            self.retries += retries


class Store:
    """A folder of objects; open for use by several threads.

    Attributes:
        location: absolute path or URI by which it can be opened again.
        counters: what was asked of it.
    """

    def __init__(self, location: str, backend: Backend, backoff: Backoff) -> None:
        self.location = location
        self.counters = StoreCounters()
        self._backend = backend
        self._backoff = backoff

    @classmethod
    def open(cls, location: str | Path, config: StorageConfig | None = None) -> Store:
        """The folder at a local path or a URI; it need not exist, and nothing is asked of the storage yet.

        Raises:
            DataError: the scheme is unknown, or the URI or its credentials cannot be used.
        """
        config = config or StorageConfig()
        text = str(location)
        scheme = text.partition("://")[0] if "://" in text else "file"
        if scheme not in SCHEMES:
            known = ", ".join(f"{known}://" for known in SCHEMES)
            raise DataError(f"{text}: cannot be opened, unknown scheme '{scheme}://'. Give a local path or {known}.")
        backoff = Backoff(budget_seconds=config.retry_seconds)
        if scheme == "file":
            path = Path(text.removeprefix("file://")).expanduser().absolute()
            return cls(text if "://" in text else str(path), Files(path), backoff)
        if not urlsplit(text).netloc:
            raise DataError(f"{text}: names no bucket. Write {scheme}://BUCKET/FOLDER.")
        return cls(text.rstrip("/"), Objects(text.rstrip("/"), scheme, config), backoff)

    def name_of(self, name: str) -> str:
        """Full name of an object, for messages."""
        return f"{self.location}/{name}"

    def read(self, name: str, start: int = 0, length: int | None = None) -> memoryview:
        """Bytes of an object: all of them, or `length` from `start`.

        Raises:
            MissingObjectError: there is no such object.
            ArchivedObjectError: it must be restored first.
            DataError: it cannot be read, or not while the budget of retries lasts.
        """
        content = self._persist(name, lambda: self._backend.read(name, start, length))
        self.counters.add(bytes_read=len(content))
        if length is not None and len(content) != length:
            raise DataError(
                f"{self.name_of(name)}: ends at byte {start + len(content)}, needed up to {start + length}."
            )
        return content

    def size_of(self, name: str) -> int:
        """Bytes of an object.

        Raises:
            MissingObjectError: there is no such object.
            DataError: the storage refuses or does not answer.
        """
        return self._persist(name, lambda: self._backend.size_of(name))

    def exists(self, name: str) -> bool:
        """Whether there is an object of this name.

        Raises:
            DataError: the storage refuses or does not answer.
        """
        try:
            self.size_of(name)
        except MissingObjectError:
            return False
        return True

    def sizes(self, folder: str) -> dict[str, int]:
        """Name -> bytes of all objects in a folder below; empty where there is no such folder.

        Raises:
            DataError: the storage refuses or does not answer.
        """
        return self._persist(folder, lambda: self._backend.sizes(folder))

    def listing(self, folder: str) -> dict[str, tuple[int, str]]:
        """Name -> bytes and version (ETag or time of change) of all objects in a folder below.

        Raises:
            DataError: the storage refuses or does not answer.
        """
        return self._persist(folder, lambda: self._backend.listing(folder))

    def write(self, name: str, content: bytes) -> None:
        """Put an object: whole, or not at all.

        Raises:
            DataError: the storage refuses or does not answer.
        """
        self._persist(name, lambda: self._backend.write(name, content))

    def delete(self, name: str) -> None:
        """Remove an object; fine where there is none.

        Raises:
            DataError: the storage refuses or does not answer.
        """
        self._persist(name, lambda: self._backend.delete(name))

    def _persist(self, name: str, attempt: Callable[[], T]) -> T:
        """Try until it works, fails for good, or the budget is spent."""
        reason = ""
        for number in self._backoff.attempts():
            self.counters.add(requests=1, retries=int(number > 0))
            try:
                return attempt()
            except RetryableError as error:
                reason = str(error)
                if error.expired:
                    self._backend.renew()
        raise DataError(
            f"{self.name_of(name)}: no answer within {self._backoff.budget_seconds:g} s of retries; the last: {reason}."
        )
