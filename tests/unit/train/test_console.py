from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console
from synthetic_run import finished_run, partial_run, run_config

from train.console import make_console, print_failure, print_header, print_results
from train.summary import summarise


def text_console(width: int = 120) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=width, highlight=False), stream


def row_of(output: str, label: str) -> str:
    return next(line for line in output.splitlines() if line.split()[:1] == [label])


def test_first_lines_of_a_rehearsal_say_so_with_full_size_beside() -> None:
    console, stream = text_console()
    print_header(console, run_config(), "2 CPU cores, 24 GiB memory, no GPU", 2)
    output = stream.getvalue()
    assert "Rehearsal of business_module" in output.strip().splitlines()[0]
    assert "2 CPU cores, 24 GiB memory, no GPU" in output
    for label, rehearsed, full in (
        ("ranks", "2 on this machine", "256 x H200 SXM"),
        ("model", "4.7M parameters", "70.6B parameters"),
        ("specialise", "492K tokens", "170B tokens"),
        ("mesh", "tensor 1 x context 1 x data 2 x pipeline 1", "tensor 4 x context 2 x data 8 x pipeline 4"),
        ("precision", "fp32", "bf16"),
        ("budget", "none", "7 days at 1 MW"),
    ):
        row = row_of(output, label)
        assert row.index(rehearsed) < row.index(full)


def test_a_full_size_run_is_not_called_a_rehearsal() -> None:
    console, stream = text_console()
    full = run_config().full_size
    assert full is not None
    print_header(console, full, "32 nodes of 8 H200", 256)
    assert "ehears" not in stream.getvalue()
    assert "business_module at full size" in stream.getvalue()


def test_results_show_stages_models_gains_and_what_next() -> None:
    console, stream = text_console()
    closing = {"report": "/runs/" + "long-name/" * 20 + "report.html", "resume with": "python -m train resume=latest"}
    print_results(console, summarise(finished_run()), closing)
    output = stream.getvalue()
    assert output.strip().startswith("Finished")
    for label in ("pretrain", "specialise", "evaluate", "export", "init", "bigram"):
        assert row_of(output, label)
    assert "0.740 \N{PLUS-MINUS SIGN} 0.022" in output
    verdicts = [line.split()[-1] for line in output.splitlines() if line.split()[1:2] in (["pretrain"], ["bigram"])]
    assert verdicts == ["yes", "yes", "yes", "no"]
    # Paths are to be copied: never folded, whatever the width.
    assert all(value in output for value in closing.values())
    assert "warning: rank 1 was slow" in output


def test_results_of_a_failed_run_say_what_is_unfinished() -> None:
    console, stream = text_console()
    print_results(console, summarise(partial_run()), {})
    assert "Failed" in stream.getvalue()
    assert "unfinished" in row_of(stream.getvalue(), "pretrain")


def test_results_of_a_run_that_recorded_nothing_can_be_shown() -> None:
    console, stream = text_console()
    print_results(console, summarise([]), {"run": "/runs/x"})
    assert "/runs/x" in stream.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80])
def test_narrow_terminals_are_not_overrun(width: int) -> None:
    console, stream = text_console(width)
    print_header(console, run_config(), "a machine", 2)
    assert max(map(len, stream.getvalue().splitlines())) <= width


def test_names_that_look_like_markup_are_shown_as_they_are() -> None:
    records = [
        {**record, "model": "[red]m[/x]", "source": "[/]s"} if record["kind"] == "evaluation" else record
        for record in finished_run()
    ]
    console, stream = text_console()
    print_results(console, summarise(records), {})
    print_header(console, replace(run_config(), description="[bold]all[/nothing]"), "[/]", 1)
    print_failure(console, who="rank 1", reason="list[/int]", log="/tmp/[a]")
    for text in ("[red]m[/x]", "[/]s", "[bold]all[/nothing]", "list[/int]", "/tmp/[a]"):
        assert text in stream.getvalue()


def test_failure_names_the_rank_its_traceback_and_its_log() -> None:
    console, stream = text_console(40)
    print_failure(
        console, who="rank 3", reason="Traceback\n  deep\nValueError: " + "x" * 100, log="/runs/r/logs/rank-3.log"
    )
    output = stream.getvalue()
    assert "Rank 3 failed" in output
    assert "ValueError: " + "x" * 100 in output
    assert "/runs/r/logs/rank-3.log" in output


def test_output_to_a_file_has_no_escapes_and_survives_an_ascii_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = make_console(stream)
    print_results(console, summarise(finished_run()), {})
    stream.flush()
    output = stream.buffer.getvalue()  # type: ignore[attr-defined]
    assert b"3.610 ? 0.021" in output
    assert b"\x1b" not in output
