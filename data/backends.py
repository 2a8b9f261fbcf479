"""What a storage must do for a `Store`: one attempt at each verb; and how it says what went wrong."""

from __future__ import annotations

from typing import Protocol

from conf.errors import DataError


class MissingObjectError(DataError):
    """There is no object of this name."""


class ArchivedObjectError(DataError):
    """The object is in an archive storage class and must be restored before it can be read."""


class RetryableError(Exception):
    """A request failed in a way that may not last; `expired` asks for new credentials first."""

    def __init__(self, reason: str, *, expired: bool = False) -> None:
        super().__init__(reason)
        self.expired = expired


class Backend(Protocol):
    """One attempt at each verb; raises `DataError` for what will not pass, `RetryableError` for what may."""

    def read(self, name: str, start: int, length: int | None) -> memoryview:
        """Bytes of an object: `length` of them, or to its end."""
        ...

    def size_of(self, name: str) -> int:
        """Bytes of an object."""
        ...

    def sizes(self, folder: str) -> dict[str, int]:
        """Name -> bytes of all objects in a folder."""
        ...

    def listing(self, folder: str) -> dict[str, tuple[int, str]]:
        """Name -> bytes and version (ETag or time of change) of all objects in a folder."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Put an object: whole, or not at all."""
        ...

    def delete(self, name: str) -> None:
        """Remove an object; fine where there is none."""
        ...

    def renew(self) -> None:
        """Ask for new credentials."""
        ...
