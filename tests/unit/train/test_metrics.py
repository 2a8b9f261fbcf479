from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.metrics import Follower, MetricsWriter, read, steps_of, validations_of
from train.records import Record

# What a second process runs: as many messages as asked for, each long enough to be torn if lines could interleave.
APPENDER = """
import sys; from pathlib import Path; from train.metrics import MetricsWriter
with MetricsWriter(Path(sys.argv[1])) as writer:
    for number in range(int(sys.argv[3])):
        writer.write("message", level="info", text=sys.argv[2] * 3000 + str(number))
"""


def started(stage: str, step: int) -> Record:
    return {
        "kind": "stage_started",
        "stage": stage,
        "stage_kind": "pretrain",
        "num_parameters": 1,
        "num_steps": 100,
        "step": step,
        "tokens_per_step": 1,
    }


def step_record(stage: str, step: int, loss: float) -> Record:
    return {
        "kind": "step",
        "stage": stage,
        "step": step,
        "num_steps": 100,
        "loss": loss,
        "learning_rate": 1.0,
        "grad_norm": 1.0,
        "tokens": step,
        "step_seconds": 1.0,
        "tokens_per_second": 1.0,
        "model_tflops": 1.0,
        "mfu": None,
        "memory_bytes": 1,
        "metrics": {},
    }


def say(writer: MetricsWriter, text: str) -> None:
    writer.write("message", level="info", text=text)


def texts(records: list[Record]) -> list[str]:
    return [record["text"] for record in records if record["kind"] == "message"]


def test_lines_of_two_processes_never_mix(tmp_path: Path) -> None:
    path, count = tmp_path / "metrics.jsonl", 200
    appenders = [
        subprocess.Popen([sys.executable, "-c", APPENDER, str(path), letter, str(count)]) for letter in ("a", "b")
    ]
    assert [appender.wait(timeout=60) for appender in appenders] == [0, 0]
    for letter in ("a", "b"):
        mine = [text for text in texts(read(path)) if text.startswith(letter)]
        assert mine == [letter * 3000 + str(number) for number in range(count)]
    assert len(path.read_bytes().splitlines()) == 2 * count


def test_opening_in_the_middle_of_another_write_takes_no_line_for_torn(tmp_path: Path) -> None:
    path, count = tmp_path / "metrics.jsonl", 100
    with subprocess.Popen([sys.executable, "-c", APPENDER, str(path), "a", str(20 * count)]) as appender:
        while not path.exists():
            assert appender.poll() is None
        for _ in range(count):
            with MetricsWriter(path) as writer:
                say(writer, "b")
        assert appender.wait(timeout=60) == 0
    assert path.read_bytes().count(b"\n") == 21 * count
    assert b"\n\n" not in path.read_bytes()


@given(loss=st.floats(), metric=st.floats(), mfu=st.none() | st.floats())
def test_every_number_comes_back_to_the_last_bit_and_every_line_is_json(
    tmp_path_factory: pytest.TempPathFactory, loss: float, metric: float, mfu: float | None
) -> None:
    path = tmp_path_factory.mktemp("numbers") / "metrics.jsonl"
    fields = {key: value for key, value in step_record("s", 1, loss).items() if key != "kind"}
    with MetricsWriter(path) as writer:
        writer.write("step", **fields | {"mfu": mfu, "metrics": {"float": metric}})
    json.loads(path.read_text(), parse_constant=pytest.fail)
    (record,) = read(path)
    assert record["kind"] == "step"
    for written, came_back in ((loss, record["loss"]), (metric, record["metrics"]["float"]), (mfu, record["mfu"])):
        if written is not None and math.isnan(written):
            assert came_back is not None and math.isnan(came_back)
        else:
            assert repr(came_back) == repr(written)


def test_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        say(writer, "before")
    with path.open("ab") as file:
        file.write(b'{"kind":"message","text":"to')
    assert texts(read(path)) == ["before"]
    with MetricsWriter(path) as writer:
        say(writer, "after")
    assert texts(read(path)) == ["before", "after"]


def test_a_line_another_process_was_killed_in_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        say(writer, "before")
        with path.open("ab") as file:
            file.write(b'{"kind":"message","text":"to')
        say(writer, "after")
    assert texts(read(path)) == ["before", "after"]


def test_a_full_disk_raises() -> None:
    with MetricsWriter(Path("/dev/full")) as writer, pytest.raises(OSError) as raised:
        say(writer, "lost")
    assert raised.value.errno == errno.ENOSPC


def test_a_line_cut_short_by_a_full_disk_raises_and_spares_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        whole_write = os.write
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", lambda descriptor, data: whole_write(descriptor, data[:20]))
            with pytest.raises(OSError, match=r"20 of \d+ bytes"):
                say(writer, "lost")
        say(writer, "after")
    assert texts(read(path)) == ["after"]


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        ("mesage", {"level": "info", "text": ""}, "mesage"),
        ("message", {"level": "info"}, "text"),
        ("message", {"level": "info", "text": "", "rank": 3}, "rank"),
    ],
)
def test_records_outside_the_format_are_refused_by_name(
    tmp_path: Path, kind: str, fields: dict[str, object], named: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer, pytest.raises(ValueError, match=named):
        writer.write(kind, **fields)
    assert path.read_bytes() == b""


def test_follower_shows_every_record_once_and_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    assert follower.poll() == []
    lines = b"".join(
        json.dumps({"kind": "message", "level": "info", "text": f"{number} \N{GREEK SMALL LETTER ALPHA}"}).encode()
        + b"\n"
        for number in range(3)
    )
    seen: list[Record] = []
    with path.open("ab") as file:
        for position in range(len(lines)):
            file.write(lines[position : position + 1])
            file.flush()
            seen += follower.poll()
            assert len(seen) == lines[: position + 1].count(b"\n")
    assert seen == read(path)


def test_follower_begins_where_it_is_told(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        say(writer, "earlier")
        follower = Follower(path, offset=path.stat().st_size)
        say(writer, "now")
    assert texts(follower.poll()) == ["now"]


def test_resumed_steps_replace_those_taken_before() -> None:
    records = [started("s", 0), *(step_record("s", step, 1.0) for step in range(1, 8))]
    records += [step_record("other", 3, 9.0)]
    records += [started("s", 4), step_record("s", 5, 2.0)]
    # Steps 6 and 7 of the first attempt came from a state that was given up.
    assert [(step["step"], step["loss"]) for step in steps_of(records, "s")] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (4, 1.0),
        (5, 2.0),
    ]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 10)), min_size=1))
def test_steps_are_unique_in_order_and_from_the_newest_attempt(attempts: list[tuple[int, int]]) -> None:
    records: list[Record] = []
    newest: dict[int, float] = {}
    for attempt, (first, count) in enumerate(attempts):
        records.append(started("s", first))
        newest = {step: loss for step, loss in newest.items() if step <= first}
        for step in range(first + 1, first + 1 + count):
            records.append(step_record("s", step, float(attempt)))
            newest[step] = float(attempt)
    assert {step["step"]: step["loss"] for step in steps_of(records, "s")} == newest
    steps = [step["step"] for step in steps_of(records, "s")]
    assert steps == sorted(set(steps))


def test_validations_follow_the_same_rule() -> None:
    def validation(step: int, source: str, loss: float) -> Record:
        return {
            "kind": "validation",
            "stage": "s",
            "step": step,
            "source": source,
            "loss": loss,
            "standard_error": 0.1,
            "accuracy": 0.5,
            "num_tokens": 10,
        }

    records = [started("s", 0), validation(2, "a", 1.0), validation(4, "a", 1.0), validation(4, "b", 1.0)]
    records += [started("s", 2), validation(4, "b", 2.0)]
    found = [(each["step"], each["source"], each["loss"]) for each in validations_of(records, "s")]
    assert found == [(2, "a", 1.0), (4, "b", 2.0)]
