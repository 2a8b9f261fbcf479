"""The record of a run: one JSON object a line in `metrics.jsonl`. Screen, W&B and report only read this file.

What the lines say is in `records.py`.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, cast, get_args, get_type_hints

from train.records import Record, Step, Validation

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends records to a file. Several processes may have one open on the same file."""

    def __init__(self, path: Path) -> None:
        """Open `path` for appending and make it where it is missing.

        Raises:
            OSError: it cannot be made or opened.
        """
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def write(self, kind: str, **fields: object) -> None:
        """Append one record; `time` is added.

        Args:
            kind: one of the kinds above.
            fields: exactly the fields of that kind.

        Raises:
            ValueError: there is no such kind, or a field is missing or unknown.
            TypeError: a value cannot be written as JSON.
            OSError: the line could not be written whole (the disk is full).
        """
        _check(kind, fields)
        timed = {"kind": kind, "time": time.time(), **fields}
        line = json.dumps(_finite(timed), allow_nan=False, separators=(",", ":")).encode() + b"\n"
        # Appending alone keeps lines apart only on local disks, and what another process is in the middle of writing
        # looks like a line it was killed in. The lock goes with the process, however it ends.
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        try:
            if self._ends_inside_a_line():
                line = b"\n" + line
            num_written = os.write(self._descriptor, line)
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        if num_written < len(line):
            raise OSError(errno.ENOSPC, f"wrote {num_written} of {len(line)} bytes", str(self.path))

    def close(self) -> None:
        """Release the file; closing twice is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _ends_inside_a_line(self) -> bool:
        size = os.fstat(self._descriptor).st_size
        return size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"


class Follower:
    """Reads a record file that is still being written."""

    def __init__(self, path: Path, *, offset: int = 0) -> None:
        self._path = path
        self._offset = offset

    def poll(self) -> list[Record]:
        """Records completed since the last poll; none while there is no file. An unfinished line waits for its end."""
        try:
            # Opened anew each time: a network file system shows others' appends only then.
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        return list(records_in(complete))


def read(path: Path) -> list[Record]:
    """All complete records of a file, in order. Lines torn by a full disk or a kill are left out.

    Raises:
        FileNotFoundError: there is no such file.
    """
    return list(records_in(path.read_bytes()))


def records_in(data: bytes) -> Iterator[Record]:
    """Records in the bytes of a record file. Lines torn by a full disk or a kill are left out."""
    for line in data.splitlines():
        try:
            record = json.loads(line, object_hook=_decoded)
        except ValueError:
            continue
        if isinstance(record, dict) and "kind" in record:
            yield cast(Record, record)


def steps_of(records: Iterable[Record], stage: str) -> list[Step]:
    """Step records of a stage in order of step, one for each step.

    A stage that was stopped and resumed has taken some steps twice: the last record counts, and steps after the
    checkpoint it resumed from count only once they have been taken again.
    """
    latest: dict[int, Step] = {}
    for record in records:
        if record["kind"] == "stage_started" and record["stage"] == stage:
            first = record["step"]
            latest = {step: taken for step, taken in latest.items() if step <= first}
        elif record["kind"] == "step" and record["stage"] == stage:
            latest[record["step"]] = record
    return [latest[step] for step in sorted(latest)]


def validations_of(records: Iterable[Record], stage: str) -> list[Validation]:
    """Validation records of a stage in order of step and source; the same rule for resumed stages as `steps_of`."""
    latest: dict[tuple[int, str], Validation] = {}
    for record in records:
        if record["kind"] == "stage_started" and record["stage"] == stage:
            first = record["step"]
            latest = {key: taken for key, taken in latest.items() if key[0] <= first}
        elif record["kind"] == "validation" and record["stage"] == stage:
            latest[record["step"], record["source"]] = record
    return [latest[key] for key in sorted(latest)]


def _check(kind: str, fields: Mapping[str, object]) -> None:
    expected = _fields_by_kind().get(kind)
    if expected is None:
        raise ValueError(f"no kind of record is named {kind}; there are {', '.join(_fields_by_kind())}")
    if fields.keys() != expected:
        raise ValueError(
            f"a record of kind {kind} lacks {sorted(expected - fields.keys())} and has unknown fields "
            f"{sorted(fields.keys() - expected)}; it has exactly {sorted(expected)}"
        )


@functools.cache
def _fields_by_kind() -> dict[str, frozenset[str]]:
    fields = {}
    for record_type in get_args(Record):
        hints = get_type_hints(record_type)
        fields[get_args(hints["kind"])[0]] = frozenset(hints.keys() - {"kind", "time"})
    return fields


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return value


def _decoded(value: dict[str, object]) -> object:
    number = value.get("float")
    return float(number) if len(value) == 1 and isinstance(number, str) else value
