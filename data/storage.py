"""A folder of objects: a local path, `s3://` at any endpoint, `gs://` or `az://`; the same few verbs for all of them.

Objects are read by obstore (lean on CPU); what S3 alone can do (storage classes, restoring) is in `archive.py`.
Every request has a time-out, is tried again while a budget of time lasts, and ends in an error that names the object.
Credentials come from the provider's own chain (environment, profile, role) and go nowhere else.
"""

from __future__ import annotations

import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from conf.errors import DataError
from conf.schema import StorageConfig
from data.retry import Backoff

SCHEMES = ("file", "s3", "gs", "az")
DENIED = ("AccessDenied", "AllAccessDisabled", "InvalidAccessKeyId", "SignatureDoesNotMatch")
CONNECT_SECONDS = 5
CREDENTIAL_MINUTES = 10
"""Credentials are asked for again after this, or before they end where they say when."""

T = TypeVar("T")


class MissingObjectError(DataError):
    """There is no object of this name."""


class ArchivedObjectError(DataError):
    """The object is in an archive storage class and must be restored before it can be read."""


class _RetryableError(Exception):
    """A request failed in a way that may not last; `expired` asks for new credentials first."""

    def __init__(self, reason: str, *, expired: bool = False) -> None:
        super().__init__(reason)
        self.expired = expired


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


class _Backend(Protocol):
    """One attempt at each verb; raises `DataError` for what will not pass, `_RetryableError` for what may."""

    def read(self, name: str, start: int, length: int | None) -> memoryview: ...

    def size_of(self, name: str) -> int: ...

    def sizes(self, folder: str) -> dict[str, int]: ...

    def listing(self, folder: str) -> dict[str, tuple[int, str]]: ...

    def write(self, name: str, content: bytes) -> None: ...

    def delete(self, name: str) -> None: ...

    def renew(self) -> None: ...


class Store:
    """A folder of objects; open for use by several threads.

    Attributes:
        location: absolute path or URI by which it can be opened again.
        counters: what was asked of it.
    """

    def __init__(self, location: str, backend: _Backend, backoff: Backoff) -> None:
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
            return cls(text if "://" in text else str(path), _Files(path), backoff)
        if not urlsplit(text).netloc:
            raise DataError(f"{text}: names no bucket. Write {scheme}://BUCKET/FOLDER.")
        return cls(text.rstrip("/"), _Objects(text.rstrip("/"), scheme, config), backoff)

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
            except _RetryableError as error:
                reason = str(error)
                if error.expired:
                    self._backend.renew()
        raise DataError(
            f"{self.name_of(name)}: no answer within {self._backoff.budget_seconds:g} s of retries; the last: {reason}."
        )


class _Files:
    """Objects that are local files."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, name: str, start: int, length: int | None) -> memoryview:
        with _explained_file(self._root / name):
            with (self._root / name).open("rb", buffering=0) as stream:
                if start:
                    stream.seek(start)
                return memoryview(stream.readall() if length is None else stream.read(length))

    def size_of(self, name: str) -> int:
        with _explained_file(self._root / name):
            return (self._root / name).stat().st_size

    def sizes(self, folder: str) -> dict[str, int]:
        with _explained_file(self._root / folder):
            found = (self._root / folder).rglob("*")
            return {path.relative_to(self._root).as_posix(): path.stat().st_size for path in found if path.is_file()}

    def listing(self, folder: str) -> dict[str, tuple[int, str]]:
        sizes = self.sizes(folder)
        return {name: (size, str((self._root / name).stat().st_mtime_ns)) for name, size in sizes.items()}

    def write(self, name: str, content: bytes) -> None:
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
        with _explained_file(self._root / name):
            (self._root / name).unlink(missing_ok=True)

    def renew(self) -> None:
        pass


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


class _Objects:
    """Objects in a bucket."""

    def __init__(self, location: str, scheme: str, config: StorageConfig) -> None:
        self._location = location
        self._scheme = scheme
        self._config = config
        self._client: Any = None
        self._lock = threading.Lock()

    def read(self, name: str, start: int, length: int | None) -> memoryview:
        import obstore

        with _explained_object(self._location, name):
            if length is None and not start:
                return memoryview(obstore.get(self._opened(), name).bytes())
            if length is None:
                length = obstore.head(self._opened(), name)["size"] - start
            return memoryview(obstore.get_range(self._opened(), name, start=start, length=length))

    def size_of(self, name: str) -> int:
        import obstore

        with _explained_object(self._location, name):
            return int(obstore.head(self._opened(), name)["size"])

    def sizes(self, folder: str) -> dict[str, int]:
        import obstore

        with _explained_object(self._location, folder):
            batches = obstore.list(self._opened(), prefix=folder or None)
            return {str(entry["path"]): int(entry["size"]) for batch in batches for entry in batch}

    def listing(self, folder: str) -> dict[str, tuple[int, str]]:
        import obstore

        with _explained_object(self._location, folder):
            entries = [entry for batch in obstore.list(self._opened(), prefix=folder or None) for entry in batch]
        return {str(entry["path"]): (int(entry["size"]), str(entry["e_tag"])) for entry in entries}

    def write(self, name: str, content: bytes) -> None:
        import obstore

        with _explained_object(self._location, name):
            obstore.put(self._opened(), name, content)

    def delete(self, name: str) -> None:
        import obstore

        with _explained_object(self._location, name):
            obstore.delete(self._opened(), name)

    def renew(self) -> None:
        with self._lock:
            self._client = None

    def _opened(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = _client(self._location, self._scheme, self._config)
            return self._client


def _client(location: str, scheme: str, config: StorageConfig) -> Any:
    """An obstore client; retries are ours, so it makes none."""
    from obstore.store import from_url

    options: dict[str, Any] = {
        "timeout": timedelta(seconds=config.request_seconds),
        "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
    }
    arguments: dict[str, Any] = {"client_options": options, "retry_config": {"max_retries": 0}}
    if scheme == "s3":
        session = aws_session()
        endpoint = config.endpoint or _aws_endpoint(session)
        if endpoint:
            arguments["endpoint"] = endpoint
            options["allow_http"] = endpoint.startswith("http://")
        arguments["region"] = config.region or session.get_config_variable("region") or "us-east-1"
        arguments["virtual_hosted_style_request"] = False if endpoint else True
        arguments["credential_provider"] = _AwsCredentials(session, location)
        if config.encryption == "sse_s3":
            arguments["server_side_encryption"] = "AES256"
        elif config.encryption == "sse_kms":
            arguments["server_side_encryption"] = "aws:kms"
            if config.kms_key_id:
                arguments["sse_kms_key_id"] = config.kms_key_id
    elif config.endpoint:
        arguments["endpoint"] = config.endpoint
        options["allow_http"] = config.endpoint.startswith("http://")
    try:
        return from_url(location, **arguments)
    except Exception as error:  # obstore raises several kinds for a URI or option that it cannot use
        raise DataError(f"{location}: cannot be opened ({_first_line(error)}).") from error


def aws_session() -> Any:
    """A botocore session: the standard chain of environment, profile, web identity and instance role."""
    import botocore.session

    return botocore.session.Session()


def _aws_endpoint(session: Any) -> str | None:
    """`AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL` or the profile's `endpoint_url`."""
    from botocore.configprovider import ConfiguredEndpointProvider

    provider = ConfiguredEndpointProvider(
        full_config=session.full_config, scoped_config=session.get_scoped_config(), client_name="s3"
    )
    endpoint: str | None = provider.provide()
    return endpoint


class _AwsCredentials:
    """What obstore asks for credentials; asked again when they end."""

    def __init__(self, session: Any, location: str) -> None:
        self._credentials = session.get_credentials()
        if self._credentials is None:
            raise DataError(
                f"{location}: no AWS credentials found in the standard chain "
                "(environment, profile, web identity, instance role). Set AWS_PROFILE or give the node a role."
            )

    def __call__(self) -> dict[str, Any]:
        frozen = self._credentials.get_frozen_credentials()
        soon = datetime.now(UTC) + timedelta(minutes=CREDENTIAL_MINUTES)
        ends = getattr(self._credentials, "_expiry_time", None) or soon
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": ends,
        }


class _explained_object:
    """Turns what obstore raises into errors that name the object and the rule, or ask for another attempt."""

    def __init__(self, location: str, name: str) -> None:
        self._location = location
        self._name = f"{location}/{name}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        from obstore import exceptions

        if error is None or isinstance(error, DataError) or not isinstance(error, Exception):
            return
        text = str(error)
        code = match[1] if (match := re.search(r"<Code>(\w+)</Code>", text)) else ""
        if code in ("ExpiredToken", "RequestTimeTooSkewed", "TokenRefreshRequired") or "ExpiredToken" in text:
            raise _RetryableError(f"credentials expired ({code})", expired=True) from error
        if problem := _lasting(code, text, self._location, self._name):
            raise problem from error
        if isinstance(error, exceptions.NotFoundError | FileNotFoundError):
            raise MissingObjectError(f"{self._name}: cannot be read, there is no such object.") from error
        # A refused listing comes as an error of no kind, with the provider's code in its text.
        if code in DENIED or isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
            raise DataError(
                f"{self._name}: access denied ({code or _first_line(error)}). The credentials in use must be allowed "
                "to list, get and, for preparing, put objects there."
            ) from error
        if isinstance(error, exceptions.BaseError) and not isinstance(error, exceptions.GenericError):
            raise DataError(f"{self._name}: {_first_line(error)}.") from error
        raise _RetryableError(_first_line(error)) from error


def _lasting(code: str, text: str, location: str, name: str) -> DataError | None:
    """The error for an answer that another attempt would not change, whatever obstore calls it."""
    if code == "NoSuchBucket":
        return DataError(f"{name}: there is no bucket '{urlsplit(location).netloc}'. Check its name and the endpoint.")
    if code == "InvalidObjectState":
        return ArchivedObjectError(f"{name}: is archived and must be restored first (python -m data.thaw).")
    if code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException") or (
        "incorrectly configured region" in text
    ):
        right = match[1] if (match := re.search(r"<Region>([\w-]+)</Region>", text)) else "the bucket's own"
        return DataError(f"{name}: wrong region. Set data.storage.region to {right} (or AWS_REGION).")
    if code == "InvalidRange":
        return DataError(f"{name}: is shorter than the range that is asked for.")
    if re.search(r"\b400 Bad Request\b|status: 400\b", text):
        return DataError(f"{name}: the storage refuses the request ({code or 'bad request'}).")
    return None


def _first_line(error: BaseException) -> str:
    """The first sentence of a message that may go on for pages; never holds credentials, which are not in URLs."""
    line = re.sub(r"\s+", " ", str(error).split("\n\nDebug source")[0]).strip()
    return line[:300]


def relative_parts(path: str) -> Iterator[str]:
    """The parts of a plain relative path.

    Raises:
        ValueError: it is absolute, not in its plain form, or leaves its folder.
    """
    plain = PurePosixPath(path)
    if plain.is_absolute() or "\\" in path or plain.as_posix() != path or ".." in plain.parts or not plain.parts:
        raise ValueError(path)
    return iter(plain.parts)
