"""Objects in a bucket, `s3://`, `gs://` or `az://`, by obstore, which is lean on CPU.

Credentials come from the provider's own chain (environment, profile, role) and go nowhere else.
"""

from __future__ import annotations

import re
import threading
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from conf.errors import DataError
from conf.schema import StorageConfig
from data.backends import ArchivedObjectError, MissingObjectError, RetryableError

CONNECT_SECONDS = 5
DENIED = ("AccessDenied", "AllAccessDisabled", "InvalidAccessKeyId", "SignatureDoesNotMatch")
WITHOUT_CLIENT = ("env", "shared-credentials-file", "config-file", "iam-role", "container-role", "custom-process")
"""Botocore's names for credentials that it needs no client of another AWS service to get."""
CREDENTIAL_MINUTES = 10
"""Credentials are asked for again after this, or before they end where they say when."""


class Objects:
    """Objects in a bucket."""

    def __init__(self, location: str, scheme: str, config: StorageConfig) -> None:
        self._location = location
        self._scheme = scheme
        self._config = config
        self._client: Any = None
        self._lock = threading.Lock()

    def read(self, name: str, start: int, length: int | None) -> memoryview:
        """See `Backend`."""
        import obstore

        with _explained_object(self._location, name):
            if length is None and not start:
                return memoryview(obstore.get(self._opened(), name).bytes())
            if length is None:
                length = obstore.head(self._opened(), name)["size"] - start
            return memoryview(obstore.get_range(self._opened(), name, start=start, length=length))

    def size_of(self, name: str) -> int:
        """See `Backend`."""
        import obstore

        with _explained_object(self._location, name):
            return int(obstore.head(self._opened(), name)["size"])

    def sizes(self, folder: str) -> dict[str, int]:
        """See `Backend`."""
        import obstore

        with _explained_object(self._location, folder):
            batches = obstore.list(self._opened(), prefix=folder or None)
            return {str(entry["path"]): int(entry["size"]) for batch in batches for entry in batch}

    def listing(self, folder: str) -> dict[str, tuple[int, str]]:
        """Name -> bytes and ETag of all objects in a folder."""
        import obstore

        with _explained_object(self._location, folder):
            entries = [entry for batch in obstore.list(self._opened(), prefix=folder or None) for entry in batch]
        return {str(entry["path"]): (int(entry["size"]), str(entry["e_tag"])) for entry in entries}

    def write(self, name: str, content: bytes) -> None:
        """See `Backend`."""
        import obstore

        with _explained_object(self._location, name):
            obstore.put(self._opened(), name, content)

    def delete(self, name: str) -> None:
        """See `Backend`."""
        import obstore

        with _explained_object(self._location, name):
            obstore.delete(self._opened(), name)

    def renew(self) -> None:
        """See `Backend`."""
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
        arguments["base_url" if scheme == "gs" else "endpoint"] = config.endpoint
        options["allow_http"] = config.endpoint.startswith("http://")
    try:
        return from_url(location, **arguments)
    except Exception as error:  # obstore raises several kinds for a URI or option that it cannot use
        raise DataError(f"{location}: cannot be opened ({_first_line(error)}).") from error


def aws_session(*, for_clients: bool = False) -> Any:
    """A botocore session: the standard chain of environment, profile, web identity and instance role.

    Args:
        for_clients: whether it can make clients of AWS services; what they need takes 10 ms.
    """
    import botocore.session

    return botocore.session.Session(include_builtin_handlers=for_clients)


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
        if self._credentials is not None and self._credentials.method not in WITHOUT_CLIENT:
            self._credentials = aws_session(for_clients=True).get_credentials()
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
            raise RetryableError(f"credentials expired ({code})", expired=True) from error
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
        raise RetryableError(_first_line(error)) from error


def _lasting(code: str, text: str, location: str, name: str) -> DataError | None:
    """The error for an answer that another attempt would not change, whatever obstore calls it."""
    if code in ("NoSuchBucket", "ContainerNotFound"):
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
