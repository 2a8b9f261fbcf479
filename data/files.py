"""Objects that are local files."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from conf.errors import DataError
from data.backends import MissingObjectError


class Files:
    """Objects that are local files."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, name: str, start: int, length: int | None) -> memoryview:
        """See `Backend`."""
        with _explained_file(self._root / name):
            with (self._root / name).open("rb", buffering=0) as stream:
                if start:
                    stream.seek(start)
                return memoryview(stream.readall() if length is None else stream.read(length))

    def size_of(self, name: str) -> int:
        """See `Backend`."""
        with _explained_file(self._root / name):
            return (self._root / name).stat().st_size

    def sizes(self, folder: str) -> dict[str, int]:
        """See `Backend`."""
        with _explained_file(self._root / folder):
            found = (self._root / folder).rglob("*")
            return {path.relative_to(self._root).as_posix(): path.stat().st_size for path in found if path.is_file()}

    def listing(self, folder: str) -> dict[str, tuple[int, str]]:
        """Name -> bytes and time of change of all files in a folder."""
        sizes = self.sizes(folder)
        return {name: (size, str((self._root / name).stat().st_mtime_ns)) for name, size in sizes.items()}

    def write(self, name: str, content: bytes) -> None:
        """See `Backend`."""
        path = self._root / name
        partial = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:12]}")
        with _explained_file(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("wb") as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())
                partial.rename(path)
            finally:
                partial.unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        """See `Backend`."""
        with _explained_file(self._root / name):
            (self._root / name).unlink(missing_ok=True)

    def renew(self) -> None:
        """Nothing to renew."""


class _explained_file:
    """Turns what the file system says into errors that name the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
            raise MissingObjectError(f"{self._path}: cannot be read, there is no such file.") from error
        if isinstance(error, OSError):
            raise DataError(f"{self._path}: {error.strerror}.") from error
