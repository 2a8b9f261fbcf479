"""Topics on a broker of Kafka's protocol, read by the standard client: every message once, or an error names it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import servers

from conf.errors import DataError
from data import ingest as ingest_module
from data import kafka
from data.index import SPLITS
from data.ingest import Ingestion, ingest
from data.kafka import Stretch, Topic
from data.prepare import main
from data.shards import Dataset
from data.steps import Steps
from data.tokenizer import Tokenizer

PARTITIONS = 3
STEPS = Steps(rows=True, invalid_utf8="drop")


@pytest.fixture(scope="module")
def brokers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("confluent_kafka", reason="no client of Kafka here: pip install confluent-kafka")
    if servers.kafka_program() is None:
        pytest.skip("no broker of Kafka's protocol here: pip install noida-db")
    with servers.kafka(tmp_path_factory.mktemp("kafka")) as address:
        yield address


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka, "PIECE_MESSAGES", 32)
    monkeypatch.delenv(kafka.SETTINGS_VARIABLE, raising=False)


@pytest.fixture
def wanted(tmp_path: Path) -> Ingestion:
    return Ingestion(
        inputs=[],
        output=str(tmp_path / "out"),
        tokenizer=Tokenizer.load("shipped:tokenizer"),
        steps=STEPS,
        held_out_fraction=0.2,
        block_tokens=500,
        unit_bytes=20 * kafka.MESSAGE_BYTES,
        on_ray=False,
    )


def made_topic(brokers: str, name: str) -> Any:
    """A producer, of a topic that is there."""
    from confluent_kafka import Producer
    from confluent_kafka.admin import AdminClient, NewTopic

    admin = AdminClient({"bootstrap.servers": brokers})
    admin.create_topics([NewTopic(name, PARTITIONS)])[name].result(5)
    return Producer({"bootstrap.servers": brokers, "linger.ms": 5})


def send(producer: Any, topic: str, numbers: range) -> None:
    """A document for each number, dealt to the partitions."""
    for number in numbers:
        producer.produce(topic, value_of(number), partition=number % PARTITIONS)
    assert producer.flush(10) == 0


def value_of(number: int) -> bytes:
    named = {"id": f"named{number}"} if number % 10 == 0 else {}
    return json.dumps({**named, "text": f"document number {number}"}).encode()


def names_of(topic: str, numbers: range) -> dict[str, str]:
    """Id -> text of the documents of a topic that was sent numbers from 0 on."""
    return {
        f"named{number}" if number % 10 == 0 else f"{topic}/{number % PARTITIONS}:{number // PARTITIONS}": (
            f"document number {number}"
        )
        for number in numbers
    }


def held(dataset: Dataset, tokenizer: Tokenizer) -> dict[str, str]:
    found = {}
    for split in SPLITS:
        for number in range(dataset.num_documents(split)):
            document = dataset.document(split, number)
            assert document.id not in found
            found[document.id] = tokenizer.decode(document.tokens[:-1])
    return found


def bytes_of(folder: str) -> dict[str, bytes]:
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_messages_up_to_the_end_noted_at_the_start_stopped_or_not_and_the_next_goes_on(
    brokers: str, wanted: Ingestion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer = made_topic(brokers, "texts")
    send(producer, "texts", range(200))
    wanted = replace(wanted, inputs=[f"kafka://{brokers}/texts"])
    process, done = ingest_module.process, []

    def stopped(job: Any, unit: str) -> str:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(unit)
        return process(job, unit)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ingest_module, "process", stopped)
        ingest(wanted)
    # What comes now is for the next dataset, though this one is not finished.
    send(producer, "texts", range(200, 260))
    with monkeypatch.context() as patch:
        patch.setattr(ingest_module, "process", lambda job, unit: (done.append(unit), process(job, unit))[1])
        first, report = ingest(wanted)
    assert len(done) == len(set(done)) > 4
    assert held(first, wanted.tokenizer) == names_of("texts", range(200)) and report.documents == 200
    lineage = {record.path: record for record in first.manifest.inputs}
    assert list(lineage) == [
        f"kafka://{brokers}/texts/{partition}?from=0&to={end}&format=json&malformed=refuse"
        for partition, end in enumerate((67, 67, 66))
    ]
    assert sum(record.num_bytes for record in lineage.values()) == sum(len(value_of(number)) for number in range(200))

    # The same messages make the same bytes, however they are cut and whenever they are read.
    again = replace(wanted, output=str(tmp_path / "again"), unit_bytes=1, inputs=[f"kafka://{brokers}/texts?to=0:67,1:67,2:66"])  # fmt: skip # noqa: E501
    ingest(again)
    assert bytes_of(again.output) == bytes_of(wanted.output)

    on = replace(wanted, output=str(tmp_path / "on"), after=wanted.output)
    second, _ = ingest(on)
    assert held(second, wanted.tokenizer) == names_of("texts", range(200, 260))
    with pytest.raises(DataError, match=rf"kafka://{brokers}/texts: there is no message after {on.output}"):
        ingest(replace(on, output=str(tmp_path / "none"), after=on.output))
    # A partition that had nothing new is not forgotten.
    producer.produce("texts", b'{"text": "one more"}', partition=1)
    producer.produce("texts", b'{"text": "and another"}', partition=1)
    producer.flush(10)
    third = replace(on, output=str(tmp_path / "third"), after=on.output, held_out_fraction=0.49)
    made, _ = ingest(third)
    assert sorted(held(made, wanted.tokenizer).values()) == ["and another", "one more"]
    assert [record.path.partition("?")[2][:13] for record in made.manifest.inputs] == ["from=87&to=87", "from=87&to=89", "from=86&to=86"]  # fmt: skip # noqa: E501


def test_messages_that_are_no_documents_and_gaps_between_offsets(brokers: str, wanted: Ingestion) -> None:
    from confluent_kafka import Producer

    producer = made_topic(brokers, "mixed")
    send(producer, "mixed", range(30))
    transaction = Producer({"bootstrap.servers": brokers, "transactional.id": "one"})
    transaction.init_transactions(10)
    for finish in (transaction.abort_transaction, transaction.commit_transaction):
        transaction.begin_transaction()
        transaction.produce("mixed", json.dumps({"text": finish.__name__}).encode(), partition=0)
        # Sent, and so at an offset, as is the end of each transaction, which nobody may see.
        transaction.flush(10)
        finish(10)
    producer.produce("mixed", None, key=b"gone", partition=1)
    producer.produce("mixed", b'{"text": "\xff"}', partition=1)
    producer.flush(10)
    wanted = replace(wanted, inputs=[f"kafka://{brokers}/mixed"])
    dataset, report = ingest(wanted)
    assert {reason: found.documents for reason, found in report.dropped.items()} == {"empty": 1, "not_utf8": 1}
    texts = {**names_of("mixed", range(30)), "mixed/0:12": "commit_transaction"}
    assert held(dataset, wanted.tokenizer) == texts

    producer.produce("mixed", b"no JSON", partition=2)
    producer.flush(10)
    place = rf"kafka://{brokers}/mixed/2: offset 10: not JSON"
    with pytest.raises(DataError, match=rf"{place} .*add malformed=drop to the topic"):
        ingest(replace(wanted, output=f"{wanted.output}2"))
    with pytest.raises(DataError, match=r"mixed/0: offset 0: no string under 'body'\. .*--text-field"):
        ingest(replace(wanted, output=f"{wanted.output}3", text_field="body"))
    kept, report = ingest(replace(wanted, output=f"{wanted.output}2", inputs=[f"kafka://{brokers}/mixed?malformed=drop"]))  # fmt: skip # noqa: E501
    assert held(kept, wanted.tokenizer) == texts and report.dropped["malformed"].documents == 1
    plain, _ = ingest(replace(wanted, output=f"{wanted.output}4", inputs=[f"kafka://{brokers}/mixed?format=text&from=0:11,1:11,2:9"]))  # fmt: skip # noqa: E501
    assert held(plain, wanted.tokenizer)["mixed/2:10"] == "no JSON"


def test_what_is_not_there_any_more_is_never_passed_over(brokers: str, tmp_path: Path) -> None:
    from confluent_kafka import TopicPartition
    from confluent_kafka.admin import AdminClient

    producer = made_topic(brokers, "short")
    send(producer, "short", range(60))
    (stretch, *_) = Topic.parse(f"kafka://{brokers}/short").stretches()
    admin, before = AdminClient({"bootstrap.servers": brokers}), TopicPartition("short", 0, 5)
    admin.delete_records([before])[before].result(5)
    gone = rf"kafka://{brokers}/short/0: offset 2 is not there any more, the earliest is 5: .*from=0:5 goes on"
    with pytest.raises(DataError, match=gone):
        Topic.parse(f"kafka://{brokers}/short?from=0:2").stretches()
    # Deleted while it is read.
    with pytest.raises(DataError, match=gone):
        list(kafka.messages(stretch, 2, 10, 5.0))
    assert [offset for offset, _ in kafka.messages(stretch, 5, 10, 5.0)] == list(range(5, 10))
    longer = replace(stretch, end=25)
    with pytest.raises(DataError, match=r"ends before offset 20, and offset 25 is asked for\. Was the topic deleted"):
        list(kafka.messages(longer, 5, 25, 5.0))
    with pytest.raises(DataError, match="ends before offset 20, and offset 25 is asked for"):
        Topic.parse(f"kafka://{brokers}/short?to=1:25").stretches()
    with pytest.raises(DataError, match="from offset 9 to 8 is backwards"):
        Topic.parse(f"kafka://{brokers}/short?from=1:9&to=1:8").stretches()
    with pytest.raises(DataError, match="has no partition 7; there are 0 to 2"):
        Topic.parse(f"kafka://{brokers}/short?from=7:1").stretches()
    with pytest.raises(DataError, match=rf"kafka://{brokers}/nothing: there is no such topic"):
        Topic.parse(f"kafka://{brokers}/nothing").stretches()
    # A broker that goes away for a while costs nothing; one that stays away is named.
    with servers.kafka(tmp_path / "other") as address:
        send(made_topic(address, "short"), "short", range(60))
        other = replace(stretch, brokers=address)
        reading = kafka.messages(other, 0, 10, 1.0)
        assert next(reading)[0] == 0
    with pytest.raises(DataError, match=rf"kafka://{address}/short/0: no answer within 1 s \(.*refused"):
        list(kafka.messages(other, 0, 10, 1.0))
    assert [offset for offset, _ in reading] == list(range(1, 10)), "they were fetched"


def test_settings_come_from_a_file_and_go_nowhere(
    brokers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "client.properties"
    monkeypatch.setenv(kafka.SETTINGS_VARIABLE, str(settings))
    monkeypatch.setattr(kafka, "CONNECT_SECONDS", 1.0)
    topic = Topic.parse(f"kafka://{brokers}/texts")
    secret = "correct-horse-battery"
    said = []
    for text, rule in (
        (f"security.protocol=SSL\nssl.key.password={secret}", r"no answer within 1 s \(ssl://.*SSL"),
        (f"# ours\n\nsecurity.protocol={secret}", 'the client refuses its settings .*"security.protocol"'),
        (f"sasl.pasword={secret}", 'No such configuration property: "sasl.pasword"'),
        (f"sasl.password:{secret}", r"client\.properties:1: not a setting"),
    ):
        settings.write_text(text)
        with pytest.raises(DataError, match=rule) as error:
            topic.stretches()
        said.append(str(error.value))
    settings.unlink()
    with pytest.raises(DataError, match=r"client\.properties: cannot be read, and \$KAFKA_CONFIG names it"):
        topic.stretches()
    with pytest.raises(DataError, match="user and password are not taken from here") as error:
        Topic.parse(f"kafka://me:{secret}@{brokers}/texts")
    monkeypatch.delenv(kafka.SETTINGS_VARIABLE)
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    with pytest.raises(DataError, match=r"pip install -e \.\[kafka\]"):
        topic.stretches()
    assert secret not in "".join([*said, str(error.value), *capfd.readouterr()])


def test_what_is_wrong_with_an_input_is_said_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("confluent_kafka", reason="no client of Kafka here: pip install confluent-kafka")
    monkeypatch.setattr(kafka, "CONNECT_SECONDS", 1.0)
    (free,) = servers.free_ports(1)
    arguments = ["--output", str(tmp_path / "none"), "--tokenizer", "shipped:tokenizer"]
    for location, rule in (
        (f"kafka://127.0.0.1:{free}/texts", f"kafka://127.0.0.1:{free}/texts: no answer within 1 s (127.0.0.1:{free}"),
        ("kafka://b:1", "names no topic"),
        ("kafka://b:1/texts?from=5", "offsets are written PARTITION:OFFSET"),
        ("kafka://b:1/texts?since=5", "options are from="),
    ):
        assert main(["--input", location, *arguments]) == 2
        assert rule in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_pieces_hold_every_offset_once_and_their_bounds_do_not_depend_on_the_beginning() -> None:
    for first in range(0, 70, 7):
        for end in range(first, 140, 9):
            stretch = Stretch(
                brokers="b:1", topic="t", partition=3, first=first, end=end, form="json", malformed="drop"
            )
            pieces = stretch.pieces()
            assert [offset for piece in pieces for offset in piece] == list(range(first, end))
            assert all(piece.start == first or piece.start % 32 == 0 for piece in pieces)
            assert Stretch.of(stretch.as_file()) == stretch
