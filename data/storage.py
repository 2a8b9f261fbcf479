"""Reading stored objects: a local folder, or whatever `pyarrow.fs` opens from a URI."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pyarrow import fs

from conf.errors import DataError


@dataclass(frozen=True, slots=True)
class Storage:
    """A folder of objects.

    Attributes:
        filesystem: where it is.
        root: path of the folder on it.
        location: absolute path or URI by which it can be opened again.
    """

    filesystem: fs.FileSystem
    root: str
    location: str

    @classmethod
    def open(cls, location: str | Path) -> Storage:
        """The folder at a local path or a URI; it need not exist.

        Raises:
            DataError: the URI is not one that pyarrow can open.
        """
        text = str(location)
        if "://" not in text:
            root = str(Path(text).expanduser().absolute())
            return cls(fs.LocalFileSystem(), root, root)
        try:
            filesystem, root = fs.FileSystem.from_uri(text)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{text}: cannot be opened ({error}). Give a local path or a URI such as s3://..."
            ) from error
        return cls(filesystem, root, text)

    def name_of(self, name: str) -> str:
        """Full name of an object, for messages."""
        return f"{self.location}/{name}"

    def exists(self, name: str) -> bool:
        """Whether there is an object of this name.

        Raises:
            DataError: the storage does not answer.
        """
        try:
            found: bool = self.filesystem.get_file_info(self._path(name)).type == fs.FileType.File
        except OSError as error:
            raise DataError(f"{self.name_of(name)}: cannot be looked up ({error}).") from error
        return found

    def sizes(self, folder: str) -> dict[str, int]:
        """Name -> bytes of all objects in a folder below, by one listing; empty where there is no such folder.

        Raises:
            DataError: the storage does not answer.
        """
        selector = fs.FileSelector(self._path(folder), recursive=True, allow_not_found=True)
        try:
            found = self.filesystem.get_file_info(selector)
        except OSError as error:
            raise DataError(f"{self.name_of(folder)}: cannot be listed ({error}).") from error
        return {str(PurePosixPath(info.path).relative_to(self.root)): info.size for info in found if info.is_file}

    def read(self, name: str) -> bytes:
        """All bytes of an object.

        Raises:
            DataError: it is missing or cannot be read.
        """
        try:
            with self.filesystem.open_input_stream(self._path(name)) as stream:
                content: bytes = stream.read()
        except OSError as error:
            raise DataError(f"{self.name_of(name)}: cannot be read ({error}).") from error
        return content

    def _path(self, name: str) -> str:
        return str(PurePosixPath(self.root) / name)
