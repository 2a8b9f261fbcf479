from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text
from synthetic_run import finished_run, partial_run, run_config

from train.progress import PLAIN_LINE_SECONDS, Display

ORDER = run_config().order


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(path: Path, records: Sequence[dict[str, object]], *, seconds_a_record: float) -> list[str]:
    """What is printed off a terminal when records come one by one."""
    stream, clock = io.StringIO(), Clock()
    console = Console(file=stream, width=200, highlight=False)
    with Display(console, path, ORDER, clock=clock) as display, path.open("a") as file:
        for record in records:
            clock.now += seconds_a_record
            file.write(json.dumps(record) + "\n")
            file.flush()
            display.update()
    return stream.getvalue().splitlines()


def live_lines(path: Path, records: Sequence[dict[str, object]], width: int) -> list[str]:
    """What a terminal of a width shows at the end of the records."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    display = Display(console, path, ORDER)
    display.update()
    with console.capture() as capture:
        console.print(display._view())
    return [line.rstrip() for line in Text.from_ansi(capture.get()).plain.splitlines()]


def test_plain_lines_come_every_few_seconds_and_at_both_ends_of_a_stage(tmp_path: Path) -> None:
    records = finished_run()
    lines = shown(tmp_path / "m.jsonl", records, seconds_a_record=1.0)
    ends = [line for line in lines if "  done  " in line]
    assert [line.split()[0] for line in ends] == ["pretrain", "specialise", "evaluate", "export"]
    progress = [line for line in lines if "  step " in line]
    assert 0.5 < len(progress) / (len(records) / PLAIN_LINE_SECONDS) < 1.1
    for wanted in ("loss", "held-out", "lr ", "tokens/s", "left"):
        assert wanted in progress[-1]
    assert "specialise  started: 4.7M parameters, 120 steps, continues after step 50" in lines


def test_fast_records_do_not_flood_plain_output(tmp_path: Path) -> None:
    lines = shown(tmp_path / "m.jsonl", finished_run(), seconds_a_record=0.0)
    assert not any("  step " in line for line in lines)


def test_messages_are_shown_with_their_level(tmp_path: Path) -> None:
    lines = shown(tmp_path / "m.jsonl", partial_run(), seconds_a_record=0.0)
    assert "error: rank 1 died: killed by signal 9" in lines


def test_a_stage_without_an_end_is_called_unfinished(tmp_path: Path) -> None:
    lines = shown(tmp_path / "m.jsonl", partial_run(), seconds_a_record=0.0)
    assert "unfinished" in lines[-1] and "40/120" in lines[-1]
    assert not any("done" in line for line in lines)


def test_records_of_earlier_attempts_are_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"kind": "message", "time": 0.0, "level": "error", "text": "long ago"}) + "\n")
    stream = io.StringIO()
    with Display(Console(file=stream), path, ORDER, offset=path.stat().st_size) as display:
        display.update()
    assert stream.getvalue() == ""


@pytest.mark.parametrize("width", [30, 50, 70, 90, 130])
def test_live_line_keeps_stage_and_step_at_every_width(tmp_path: Path, width: int) -> None:
    first, *others = live_lines(tmp_path / "m.jsonl", partial_run()[:-2], width)
    assert "pretrain" in first and "40/120" in first
    assert max(map(len, [first, *others])) <= width
    assert ("lr " in first) == (width >= 120)
    if width >= 70:
        assert "loss 5.2" in first and "left" in first and others == ["  then specialise, evaluate, export"]


def test_time_left_is_at_the_pace_of_the_recent_steps(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in partial_run()[:-2]))
    display = Display(Console(file=io.StringIO()), path, ORDER)
    display.update()
    assert display.stage is not None
    # 80 steps of about 0.9 s, and 1.2 s of validation every 20.
    assert display.stage.seconds_left == pytest.approx(80 * (0.9 + 1.2 / 20), rel=0.1)
