"""The W&B mirror against the real wandb library: offline files are read back, outages are real refused connections."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from wandb.proto import wandb_internal_pb2

from train.metrics import FILE_NAME, MetricsWriter, read
from train.tracking import Tracker

FAKE_KEY = "f4keK3y" * 6
NUM_STEPS = 5


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return new_run(tmp_path)


def new_run(folder: Path) -> Path:
    config = {
        "name": "business_module",
        "description": "a description",
        "scale": "rehearsal",
        "stages": {name: {"kind": name} for name in ("specialise", "evaluate")},
        "tracking": {"mode": "auto", "project": "frontier", "entity": None, "tags": ["mine"]},
    }
    path = folder / "business_module-20260202-024000-3f9a"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    set_unreachable(monkeypatch)


def set_unreachable(patch: pytest.MonkeyPatch) -> None:
    patch.delenv("WANDB_MODE", raising=False)
    patch.setenv("WANDB_API_KEY", FAKE_KEY)
    patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


@pytest.fixture(scope="module", autouse=True)
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Tracker]]:
    """A run whose W&B cannot be reached; its mirror waits half a minute to find out, beside the other tests."""
    run_dir = new_run(tmp_path_factory.mktemp("patient"))
    with pytest.MonkeyPatch.context() as patch:
        set_unreachable(patch)
        tracker = Tracker(run_dir, mode="auto")
    with MetricsWriter(run_dir / FILE_NAME) as writer:
        start_run(writer)
        train(writer, 0, NUM_STEPS)
        end_run(writer, "finished", 0)
    yield run_dir, tracker
    tracker.finish(0)


def start_run(writer: MetricsWriter, restarts: int = 0) -> None:
    writer.write(
        "run_started",
        run="r",
        recipe="business_module",
        scale="rehearsal",
        machine="m",
        world_size=1,
        mesh="1",
        restarts=restarts,
    )


def train(writer: MetricsWriter, first: int, last: int) -> None:
    writer.write(
        "stage_started",
        stage="specialise",
        stage_kind="specialise",
        num_parameters=1000,
        num_steps=NUM_STEPS,
        step=first,
        tokens_per_step=64,
    )
    for step in range(first + 1, last + 1):
        writer.write(
            "step",
            stage="specialise",
            step=step,
            num_steps=NUM_STEPS,
            loss=9.0 / step,
            learning_rate=1e-3,
            grad_norm=1.0,
            tokens=64 * step,
            step_seconds=0.1,
            tokens_per_second=640.0,
            model_tflops=0.1,
            mfu=None,
            memory_bytes=1,
            metrics={},
        )


def evaluate(writer: MetricsWriter) -> None:
    writer.write(
        "evaluation",
        stage="evaluate",
        model="bigram",
        source="business",
        loss=5.5,
        standard_error=0.1,
        accuracy=0.2,
        accuracy_standard_error=0.01,
        num_tokens=1000,
        num_documents=10,
    )


def end_run(writer: MetricsWriter, status: str, exit_code: int) -> None:
    writer.write("run_ended", status=status, exit_code=exit_code, seconds=1.0)


def wandb_records(file: Path) -> Iterator[wandb_internal_pb2.Record]:
    """Records of a `.wandb` file: a 7-byte header, then LevelDB log frames in 32 KiB blocks."""
    data, position, block = file.read_bytes(), 7, 32_768
    pending = b""
    while position + 7 <= len(data):
        if block - position % block < 7:
            position += block - position % block
            continue
        _, length, frame_type = struct.unpack_from("<IHB", data, position)
        pending += data[position + 7 : position + 7 + length]
        position += 7 + length
        if frame_type in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pending)
            pending = b""
            yield record


def values(items: object) -> dict[str, object]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}  # type: ignore[attr-defined]


def mirrored(run_dir: Path) -> list[dict[str, object]]:
    """What the W&B files of a run hold, oldest run first."""
    runs = []
    for file in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime):
        records = list(wandb_records(file))
        run = next(record.run for record in records if record.HasField("run"))
        history = [values(record.history.item) for record in records if record.HasField("history")]
        summary: dict[str, object] = {}
        for record in records:
            summary |= values(record.summary.update)
        runs.append({"run": run, "history": history, "summary": summary, "config": values(run.config.update)})
    return runs


def is_running(pid: int) -> bool:
    # In a container nobody may reap orphans: a zombie has ended too.
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def session_of(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid) if process.status() != psutil.STATUS_ZOMBIE else None
    except (ProcessLookupError, psutil.NoSuchProcess):
        return None


def secrets_in(run_dir: Path) -> list[Path]:
    return [file for file in run_dir.rglob("*") if file.is_file() and FAKE_KEY.encode() in file.read_bytes()]


@pytest.mark.usefixtures("no_key")
def test_offline_run_holds_what_was_recorded_and_a_resumed_one_repeats_nothing(run_dir: Path) -> None:
    with MetricsWriter(run_dir / FILE_NAME) as writer:
        tracker = Tracker(run_dir, mode="auto")
        start_run(writer)
        train(writer, 0, 3)
        # Ranks died and were started again by the same driver: step 3 is taken twice.
        train(writer, 2, 4)
        end_run(writer, "stopped", 75)
        tracker.finish(60)
        resumed = Tracker(run_dir, mode="auto")
        start_run(writer, restarts=1)
        train(writer, 4, NUM_STEPS)
        writer.write("stage_ended", stage="specialise", seconds=1.0)
        evaluate(writer)
        end_run(writer, "finished", 0)
        resumed.finish(60)

    records = read(run_dir / FILE_NAME)
    assert [record for record in records if record["kind"] == "message"] == [], (run_dir / "logs/wandb.log").read_text()
    first, second, evaluation = mirrored(run_dir)
    for run, stage in ((first, "specialise"), (second, "specialise"), (evaluation, "evaluate")):
        assert run["run"].run_group == run_dir.name
        assert run["run"].job_type == stage
        assert set(run["run"].tags) == {"business_module", "rehearsal", "mine"}
        assert run["config"]["stage"] == stage
    assert "attempt 2" in second["run"].display_name
    losses = [(row["train/step"], row["train/loss"]) for row in first["history"] + second["history"]]
    recorded = {record["step"]: record["loss"] for record in records if record["kind"] == "step"}
    assert losses == sorted(recorded.items())
    assert second["summary"]["seconds"] == 1.0
    assert evaluation["summary"]["evaluation/business/bigram/loss"] == 5.5
    assert any(key.startswith("evaluation/table") for row in evaluation["history"] for key in row), evaluation[
        "history"
    ]


@pytest.mark.usefixtures("unreachable")
def test_unreachable_server_is_told_once_and_holds_nobody_up(run_dir: Path) -> None:
    with MetricsWriter(run_dir / FILE_NAME) as writer:
        began = time.monotonic()
        tracker = Tracker(run_dir, mode="auto")
        start_run(writer)
        train(writer, 0, NUM_STEPS)
        assert time.monotonic() - began < 2
        end_run(writer, "finished", 0)
        session = tracker._process.pid
        began = time.monotonic()
        tracker.finish(4)
        assert time.monotonic() - began < 15

    messages = [record for record in read(run_dir / FILE_NAME) if record["kind"] == "message"]
    assert len(messages) == 1
    assert messages[0]["level"] == "warning"
    assert str(run_dir) in messages[0]["text"]
    assert secrets_in(run_dir) == []
    assert [process for process in psutil.process_iter() if session_of(process) == session] == []


@pytest.mark.usefixtures("no_key")
def test_mirror_ends_when_the_driver_is_gone(run_dir: Path) -> None:
    driver = (
        "import os, sys; from pathlib import Path; from train.tracking import Tracker\n"
        "tracker = Tracker(Path(sys.argv[1]), mode='auto')\n"
        "print(tracker._process.pid, flush=True)\n"
        "os._exit(1)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", driver, str(run_dir)], capture_output=True, text=True, env=dict(os.environ), timeout=60
    )
    pid = int(ended.stdout)
    deadline = time.monotonic() + 30
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not is_running(pid)


@pytest.mark.usefixtures("no_key")
def test_a_broken_mirror_is_told_and_does_not_raise(run_dir: Path) -> None:
    (run_dir / "config.json").unlink()
    with MetricsWriter(run_dir / FILE_NAME) as writer:
        tracker = Tracker(run_dir, mode="auto")
        end_run(writer, "finished", 0)
        tracker.finish(60)
    messages = [record["text"] for record in read(run_dir / FILE_NAME) if record["kind"] == "message"]
    assert len(messages) == 1
    assert "config.json" in messages[0]


def test_with_time_enough_an_unreachable_server_leaves_an_offline_copy(patient: tuple[Path, Tracker]) -> None:
    run_dir, tracker = patient
    tracker.finish(90)

    messages = [record for record in read(run_dir / FILE_NAME) if record["kind"] == "message"]
    assert [message["level"] for message in messages] == ["warning"]
    assert "could not be reached" in messages[0]["text"]
    (run,) = mirrored(run_dir)
    assert [row["train/loss"] for row in run["history"]] == [9.0 / step for step in range(1, NUM_STEPS + 1)]
    assert secrets_in(run_dir) == []
