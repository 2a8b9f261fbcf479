"""Topics of Kafka as input: `kafka://HOST:PORT[,HOST:PORT...]/TOPIC[?OPTION=VALUE&...]`, read from offset to offset.

What is read is decided before anything is: from the earliest offset, or the one asked for, to the end that a partition
has at that moment. Offsets mean the same message whoever asks, so a stretch of them is read again like a file. Nothing
is committed and no consumer group is joined: where to go on stands in the lineage of the dataset that was made.

Options: `from=PARTITION:OFFSET,...` and `to=PARTITION:OFFSET,...` (not itself); `format=text`, where a value is a text
and not JSON; `malformed=drop`, to count what is not JSON with a text in it rather than stop there.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import parse_qsl, urlencode

from conf.errors import DataError
from data.index import InputRecord
from data.inputs import InputFile
from data.storage import MissingObjectError, Store

SCHEME = "kafka://"
SETTINGS_VARIABLE = "KAFKA_CONFIG"
"""Names a file of client settings, where TLS, user and password are; they go from there to the client and nowhere."""
CONNECT_SECONDS = 8.0
POLL_SECONDS = 0.5
PIECE_MESSAGES = 1 << 14
"""Messages of a piece, which begins at a multiple of it, however units are cut."""
MESSAGE_BYTES = 4096
"""What a message is taken for where work is shared out: a broker does not say how long those between offsets are."""
SETTINGS = {
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "enable.partition.eof": True,
    # Where an offset is gone, say so; never go on somewhere else.
    "auto.offset.reset": "error",
    "isolation.level": "read_committed",
    "check.crcs": True,
    # What is fetched beyond the end of a piece is thrown away.
    "queued.max.messages.kbytes": 16384,
    "fetch.queue.backoff.ms": 5,
    "fetch.error.backoff.ms": 50,
    # Errors are told by exceptions.
    "log_level": 0,
}

Offsets = Mapping[int, int]
"""Partition -> offset."""


def is_topic(location: str) -> bool:
    """Whether an input is a topic."""
    return location.startswith(SCHEME)


@dataclass(frozen=True, kw_only=True, slots=True)
class Topic:
    """A topic and what is wanted of it.

    Attributes:
        brokers: some of the cluster's, as `HOST:PORT,HOST:PORT`.
        name: of the topic.
        first: where to begin in partitions named here; in the others at the earliest message.
        end: where to end in partitions named here, before that offset; in the others at the last message.
        form: whether a value is JSON with a text in it, or a text.
        malformed: whether a value that is not JSON with a text in it is an error, or counted and dropped.
    """

    brokers: str
    name: str
    first: Offsets
    end: Offsets
    form: Literal["json", "text"] = "json"
    malformed: Literal["refuse", "drop"] = "refuse"

    @classmethod
    def parse(cls, location: str) -> Topic:
        """The topic that an input names.

        Raises:
            DataError: it is not written as one.
        """
        address, _, query = location.partition("?")
        brokers, _, name = address.removeprefix(SCHEME).partition("/")
        if "@" in brokers:
            raise DataError(f"{SCHEME}...@: user and password are not taken from here. {_SETTINGS_RULE}")
        if not brokers or not re.fullmatch(r"[\w.-]+", name, re.ASCII):
            raise DataError(f"{location}: names no topic. Write {SCHEME}HOST:PORT/TOPIC.")
        options = dict(parse_qsl(query, keep_blank_values=True))
        first, end = _offsets(location, options.pop("from", "")), _offsets(location, options.pop("to", ""))
        form, malformed = options.pop("format", "json"), options.pop("malformed", "refuse")
        if options or form not in ("json", "text") or malformed not in ("refuse", "drop"):
            raise DataError(
                f"{location}: options are from=PARTITION:OFFSET,... to=PARTITION:OFFSET,... format=json|text "
                "malformed=refuse|drop."
            )
        return cls(brokers=brokers, name=name, first=first, end=end, form=form, malformed=malformed)  # type: ignore[arg-type]

    @property
    def address(self) -> str:
        """Its URI, without options."""
        return f"{SCHEME}{self.brokers}/{self.name}"

    def stretches(self) -> list[Stretch]:
        """What there is to read at the moment of each partition, in order; some may be empty.

        Raises:
            DataError: no broker answers, there is no such topic, or offsets that are asked for are not there.
        """
        with _Client(self.brokers, self.address) as client:
            partitions = client.partitions(self.name)
            for partition in {*self.first, *self.end} - {*partitions}:
                raise DataError(f"{self.address}: has no partition {partition}; there are 0 to {len(partitions) - 1}.")
            found = []
            for partition in partitions:
                earliest, latest = client.bounds(self.name, partition)
                stretch = Stretch(
                    brokers=self.brokers,
                    topic=self.name,
                    partition=partition,
                    first=self.first.get(partition, earliest),
                    end=self.end.get(partition, latest),
                    form=self.form,
                    malformed=self.malformed,
                )
                stretch.check(earliest, latest)
                found.append(stretch)
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """Messages [first, end) of a partition, and how they are read; see `Topic`."""

    brokers: str
    topic: str
    partition: int
    first: int
    end: int
    form: str
    malformed: str

    @classmethod
    def of(cls, file: InputFile) -> Stretch:
        """The stretch that stands among the input files, the inverse of `as_file`."""
        partition, _, query = file.object.partition("?")
        options = dict(parse_qsl(query))
        brokers, _, topic = file.folder.removeprefix(SCHEME).partition("/")
        return cls(
            brokers=brokers,
            topic=topic,
            partition=int(partition),
            first=int(options["from"]),
            end=int(options["to"]),
            form=options["format"],
            malformed=options["malformed"],
        )

    @property
    def address(self) -> str:
        """URI of the partition."""
        return f"{SCHEME}{self.brokers}/{self.topic}/{self.partition}"

    def as_file(self) -> InputFile:
        """As one of the input files. Documents without an id are called `TOPIC/PARTITION:OFFSET` by it."""
        query = urlencode({"from": self.first, "to": self.end, "format": self.form, "malformed": self.malformed})
        folder, _, _ = self.address.rpartition("/")
        name = f"{self.topic}/{self.partition}"
        return InputFile(folder, f"{self.partition}?{query}", name, (self.end - self.first) * MESSAGE_BYTES, "")

    def check(self, earliest: int, latest: int) -> None:
        """Hold the stretch against what the partition has.

        Raises:
            DataError: some of it is not there.
        """
        if self.first < earliest and self.first < self.end:
            raise DataError(
                f"{self.address}: offset {self.first} is not there any more, the earliest is {earliest}: the topic's "
                "retention deleted what was before. Keep messages for longer; "
                f"from={self.partition}:{earliest} goes on without those."
            )
        if max(self.first, self.end) > latest:
            raise DataError(
                f"{self.address}: ends before offset {latest}, and offset {max(self.first, self.end)} is asked for. "
                "Was the topic deleted and made again? Then read it from its beginning, without --after."
            )
        if self.first > self.end:
            raise DataError(f"{self.address}: from offset {self.first} to {self.end} is backwards.")

    def pieces(self) -> list[range]:
        """Its offsets in pieces; the same whoever cuts them."""
        starts = [self.first, *range((self.first // PIECE_MESSAGES + 1) * PIECE_MESSAGES, self.end, PIECE_MESSAGES)]
        return [range(start, end) for start, end in zip(starts, [*starts[1:], self.end], strict=True) if start < end]


def topic_files(location: str, after: Mapping[str, Offsets], store: Store) -> list[InputFile]:
    """A topic as input files, a stretch of each partition; what is in `store` already is taken from there.

    Args:
        location: the topic's URI.
        after: topic -> where to go on in each partition; partitions not named there are new.
        store: keeps where stretches end, so that whoever goes on later reads the same.

    Raises:
        DataError: no broker answers, there is no such topic, or messages that are asked for are not there.
    """
    topic = Topic.parse(location)
    if topic.name in after:
        if topic.first:
            raise DataError(f"{location}: from=... and --after both say where to begin. Give one of them.")
        topic = replace(topic, first=after[topic.name])
    noted = f"work/offsets-{hashlib.sha256(repr(topic).encode()).hexdigest()[:32]}.json"
    with suppress(MissingObjectError):
        return [InputFile.from_json(line) for line in bytes(store.read(noted)).decode().splitlines()]
    files = [stretch.as_file() for stretch in topic.stretches()]
    store.write(noted, "\n".join(file.to_json() for file in files).encode())
    return files


def offsets_after(inputs: tuple[InputRecord, ...]) -> dict[str, dict[int, int]]:
    """Topic -> partition -> the offset after the last one that a dataset was made from, by its lineage."""
    found: dict[str, dict[int, int]] = {}
    for record in inputs:
        if is_topic(record.path):
            folder, _, name = record.path.rpartition("/")
            stretch = Stretch.of(InputFile(folder, name, "", 0, ""))
            ends = found.setdefault(stretch.topic, {})
            ends[stretch.partition] = max(stretch.end, ends.get(stretch.partition, 0))
    return found


def messages(stretch: Stretch, first: int, end: int, patience_seconds: float) -> Iterator[tuple[int, bytes | None]]:
    """Offset and value of the messages [first, end) of a stretch; what is compacted away or was aborted has none.

    Raises:
        DataError: they are not there any more, or the brokers refuse or do not answer for so long.
    """
    with _Client(stretch.brokers, stretch.address) as client:
        yield from client.messages(stretch, first, end, patience_seconds)


_SETTINGS_RULE = (
    f"Name a file with the client's settings in ${SETTINGS_VARIABLE}: lines like security.protocol=SASL_SSL, "
    "sasl.mechanism=SCRAM-SHA-512, sasl.username=..., sasl.password=..., ssl.ca.location=..."
)


class _Client:
    """The client of a cluster, for one partition at a time.

    Args:
        brokers: some of the cluster's.
        address: what it is made for, for messages.
    """

    def __init__(self, brokers: str, address: str) -> None:
        try:
            import confluent_kafka as api
        except ImportError as error:
            raise DataError(
                f"{address}: needs the client of Kafka, which is not installed. pip install -e .[kafka]"
            ) from error
        self._api = api
        self._address = address
        self._reason = ""
        given = _settings()
        settings = {"group.id": "data.prepare"} | given | SETTINGS | {"bootstrap.servers": brokers}
        try:
            self._consumer: Any = api.Consumer(settings | {"error_cb": self._note})
        except api.KafkaException as error:
            # It quotes values, and one may be a secret in the wrong place.
            reason = error.args[0].str()
            for value in sorted(given.values(), key=len, reverse=True):
                reason = reason.replace(value, "...") if value else reason
            raise DataError(f"{address}: the client refuses its settings ({reason}). {_SETTINGS_RULE}") from None

    def __enter__(self) -> _Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._consumer.close()

    def partitions(self, topic: str) -> list[int]:
        """Numbers of a topic's partitions."""
        try:
            found = self._consumer.list_topics(topic, timeout=CONNECT_SECONDS).topics[topic]
        except self._api.KafkaException as error:
            raise self._unanswered(error, CONNECT_SECONDS) from error
        if found.error is not None:
            raise self._refused(found.error)
        return sorted(found.partitions)

    def bounds(self, topic: str, partition: int) -> tuple[int, int]:
        """The earliest offset of a partition, and the one after the last that is committed."""
        try:
            place = self._api.TopicPartition(topic, partition)
            earliest, latest = self._consumer.get_watermark_offsets(place, timeout=CONNECT_SECONDS)
        except self._api.KafkaException as error:
            raise self._unanswered(error, CONNECT_SECONDS) from error
        return int(earliest), int(latest)

    def messages(
        self, stretch: Stretch, first: int, end: int, patience_seconds: float
    ) -> Iterator[tuple[int, bytes | None]]:
        """See `messages`."""
        codes, wanted = self._api.KafkaError, replace(stretch, first=first, end=end)
        self._consumer.assign([self._api.TopicPartition(stretch.topic, stretch.partition, first)])
        heard = time.monotonic()
        while True:
            message = self._consumer.poll(POLL_SECONDS)
            error = message.error() if message is not None else None
            if message is not None and error is None:
                if message.offset() < end:
                    yield message.offset(), message.value()
                if message.offset() >= end - 1:
                    return
                heard = time.monotonic()
                continue
            code = error.code() if error is not None else None
            if code == codes._PARTITION_EOF:
                wanted.check(first, message.offset())
                return
            if code == codes._AUTO_OFFSET_RESET:
                wanted.check(*self.bounds(stretch.topic, stretch.partition))
            if code == codes.TOPIC_AUTHORIZATION_FAILED:
                raise self._refused(error)
            # Whatever else there is may pass: brokers restart, partitions move.
            self._reason = error.str() if error is not None else self._reason
            if time.monotonic() - heard > patience_seconds:
                raise self._unanswered("no message came", patience_seconds)

    def _note(self, error: Any) -> None:
        if error.code() != self._api.KafkaError._ALL_BROKERS_DOWN:
            self._reason = error.str()

    def _unanswered(self, error: object, seconds: float) -> DataError:
        with suppress(self._api.KafkaException):
            # Reasons are handed over when asked for.
            self._consumer.poll(0)
        reason = self._reason or str(error)
        return DataError(f"{self._address}: no answer within {seconds:g} s ({reason}). Check the brokers' addresses; "
                         f"they may ask for TLS or a password. {_SETTINGS_RULE}")  # fmt: skip

    def _refused(self, error: Any) -> DataError:
        if error.code() == self._api.KafkaError.UNKNOWN_TOPIC_OR_PART:
            return DataError(f"{self._address}: there is no such topic. Check its name and the brokers.")
        return DataError(f"{self._address}: cannot be read ({error.str()}).")


def _settings() -> dict[str, str]:
    """What stands in the file of settings, if one is named. No line of it is ever repeated in a message."""
    name = os.environ.get(SETTINGS_VARIABLE)
    if name is None:
        return {}
    try:
        lines = Path(name).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{name}: cannot be read, and ${SETTINGS_VARIABLE} names it ({error}).") from error
    settings = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, equals, value = line.partition("=")
        if not equals:
            raise DataError(f"{name}:{number}: not a setting. Write NAME=VALUE.")
        settings[key.strip()] = value.strip()
    return settings


def _offsets(location: str, text: str) -> dict[int, int]:
    found = re.findall(r"(\d+):(\d+)(?:,|$)", text)
    if ",".join(f"{partition}:{offset}" for partition, offset in found) != text:
        raise DataError(f"{location}: offsets are written PARTITION:OFFSET,PARTITION:OFFSET, e.g. from=0:1200,1:950.")
    return {int(partition): int(offset) for partition, offset in found}
