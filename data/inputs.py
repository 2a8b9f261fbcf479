"""Files that text is read from: local paths, folders, `shipped:NAME`s and what lies under a URI."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from conf.errors import DataError
from conf.schema import StorageConfig
from data.corpora import is_shipped, shipped
from data.storage import MissingObjectError, Store

READ_BYTES = 8 << 20
"""What a stored file is read in: large enough for the storage, small beside a core's memory."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file to read documents from.

    Attributes:
        folder: the local folder or the URI it is in.
        object: its name there.
        name: its path as recorded in the lineage and in document ids: relative to the input it was found under.
        num_bytes: its size.
        version: changes when the file does: its ETag, or its time of change.
    """

    folder: str
    object: str
    name: str
    num_bytes: int
    version: str

    def __str__(self) -> str:
        return f"{self.folder}/{self.object}"

    def to_json(self) -> str:
        """For a process elsewhere."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> InputFile:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))

    def open(self, storage: StorageConfig | None = None) -> io.BufferedIOBase:
        """The file, to be read.

        Raises:
            OSError: it is local and cannot be opened.
        """
        if "://" in self.folder:
            store = Store.open(self.folder, storage)
            return io.BufferedReader(_StoredFile(store, self.object, self.num_bytes), READ_BYTES)
        return (Path(self.folder) / self.object).open("rb")

    def sha256(self, storage: StorageConfig | None = None) -> str:
        """Hash of its content.

        Raises:
            DataError: it cannot be read.
        """
        try:
            with self.open(storage) as stream:
                digest = hashlib.sha256()
                while chunk := stream.read(READ_BYTES):
                    digest.update(chunk)
        except OSError as error:
            raise DataError(f"{self}: cannot be read ({error}).") from error
        return digest.hexdigest()


def input_files(inputs: Sequence[str], storage: StorageConfig | None = None) -> list[InputFile]:
    """The files of paths, folders, URIs and `shipped:NAME`s, each folder in the order of its names.

    Raises:
        DataError: an input is missing, may not be read, or is an empty folder.
    """
    files: list[InputFile] = []
    for location in inputs:
        files += _stored(location, storage) if "://" in location else _local(location)
    return files


def _local(location: str) -> list[InputFile]:
    path = shipped(location, ".parquet") if is_shipped(location) else Path(location).expanduser()
    if path.is_file():
        return [_local_file(path, path.name)]
    if not path.is_dir():
        raise DataError(f"{location}: there is no such file or folder. Give text, jsonl or parquet, or shipped:NAME.")
    found = [
        _local_file(file, file.relative_to(path).as_posix())
        for file in sorted(path.rglob("*"))
        if file.is_file() and not _is_hidden(file.relative_to(path).as_posix())
    ]
    if not found:
        raise DataError(f"{location}: the folder holds no files. Give text, jsonl or parquet.")
    return found


def _local_file(path: Path, name: str) -> InputFile:
    path = path.absolute()
    status = path.stat()
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: cannot be read, permission denied. Make it readable or leave it out.")
    return InputFile(str(path.parent), path.name, name, status.st_size, str(status.st_mtime_ns))


def _stored(location: str, storage: StorageConfig | None) -> list[InputFile]:
    location = location.rstrip("/")
    store = Store.open(location, storage)
    listing = store.listing("")
    found = [
        InputFile(store.location, name, name, size, version)
        for name, (size, version) in sorted(listing.items())
        if not _is_hidden(name) and size
    ]
    if found:
        return found
    folder, _, name = location.rpartition("/")
    try:
        if folder.endswith(":/"):
            raise MissingObjectError(location)
        parent = Store.open(folder, storage)
        size = parent.size_of(name)
    except MissingObjectError:
        raise DataError(
            f"{location}: there is no such object, and no objects under it. Give text, jsonl or parquet."
        ) from None
    _, version = parent.listing("").get(name, (size, ""))
    return [InputFile(parent.location, name, name, size, version)]


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


class _StoredFile(io.RawIOBase):
    """An object as a file that can be sought in."""

    def __init__(self, store: Store, name: str, num_bytes: int) -> None:
        self._store = store
        self._name = name
        self._num_bytes = num_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._num_bytes}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed's buffer type is private
        length = min(len(buffer), self._num_bytes - self._position)
        if length <= 0:
            return 0
        buffer[:length] = self._store.read(self._name, self._position, length)
        self._position += length
        return length
