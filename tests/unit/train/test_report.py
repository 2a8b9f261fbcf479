from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_run import finished_run, partial_run, run_config, write_run

from conf.errors import UserError
from train.report import main, write_report

VOID = {"meta", "br", "hr", "img", "input", "link"}
NOT_LOADED = ("torch", "matplotlib", "wandb", "hydra", "ray", "recipes")


class Outline(HTMLParser):
    """Checks that tags are balanced, and collects ids, references and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attributes:
            if key == "id":
                self.ids.append(value or "")
            if key in ("src", "href", "xlink:href"):
                self.references.append(value or "")
            self.references += re.findall(r"url\(([^)]*)\)", value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def outline_of(path: Path) -> Outline:
    outline = Outline()
    outline.feed(path.read_text())
    assert outline.open == []
    return outline


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_run(tmp_path_factory.mktemp("runs") / "finished", finished_run()))


def test_report_needs_nothing_but_itself(finished: Path) -> None:
    outline = outline_of(finished)
    assert "http" not in finished.read_text()
    assert all(reference.startswith("#") for reference in outline.references)
    assert {reference.removeprefix("#") for reference in outline.references} <= set(outline.ids)
    assert "script" not in outline.tags
    assert "link" not in outline.tags


def test_pictures_do_not_share_ids_and_use_the_colours_of_the_page(finished: Path) -> None:
    outline = outline_of(finished)
    assert outline.tags.count("svg") == 6
    assert len(outline.ids) == len(set(outline.ids))
    text = finished.read_text()
    assert set(re.findall(r"var\(--([\w-]+)\)", text)) <= set(re.findall(r"--([\w-]+):", text))
    body = text[text.index("<body>") :]
    assert set(re.findall(r"#[0-9a-f]{6}\b", body)) == set()


def test_report_shows_every_stage_model_source_and_number(finished: Path) -> None:
    text = outline_of(finished).text
    for expected in (
        "business_module",
        "rehearsal",
        "finished",
        "2 CPU cores, 24 GiB memory, no GPU",
        "started 2 times",
        *run_config().order,
        *("init", "unigram", "bigram", "business", "development", "creative"),
        "3.610 \N{PLUS-MINUS SIGN} 0.021",
        "0.740 \N{PLUS-MINUS SIGN} 0.022",
        "70.6B parameters",
        "256 x H200 SXM",
        "/runs/business/export",
        "rank 1 was slow",
        "engine.mesh.tensor",
    ):
        assert expected in text, expected


def test_report_of_a_failed_run_says_what_is_missing_and_why(tmp_path: Path) -> None:
    text = outline_of(write_report(write_run(tmp_path / "run", partial_run()))).text
    assert "This run is not complete: it failed." in text
    assert "unfinished after step 40 of 120" in text
    assert "Not begun: specialise, evaluate, export" in text
    assert "rank 1 died: killed by signal 9" in text
    assert "No model has been evaluated yet" in text


@pytest.mark.parametrize("num_records", [0, 1, 2, 3, 25])
def test_report_can_be_made_at_any_moment(tmp_path: Path, num_records: int) -> None:
    text = outline_of(write_report(write_run(tmp_path / "run", finished_run()[:num_records]))).text
    assert "is running" in text


def test_text_of_a_run_is_not_read_as_html(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>&amp;'
    said_by_run = ("stage", "source", "model", "baseline", "text", "path", "machine")
    records = [
        {key: evil if key in said_by_run else value for key, value in record.items()} for record in finished_run()
    ]
    config = replace(run_config(), name=evil, description=evil, init=evil)
    outline = outline_of(write_report(write_run(tmp_path / evil.replace("/", "_"), records, config)))
    assert "script" not in outline.tags
    assert evil in outline.text


def test_losses_that_are_not_finite_leave_gaps_and_no_error(tmp_path: Path) -> None:
    records = [
        {**record, "loss": {"float": "nan"}, "grad_norm": {"float": "inf"}} if record["kind"] == "step" else record
        for record in partial_run()
    ]
    assert outline_of(write_report(write_run(tmp_path / "run", records))).tags.count("svg") == 4


def test_long_runs_make_small_reports_that_keep_spikes(tmp_path: Path) -> None:
    records = finished_run(3000)
    records[1234]["loss"] = 80.0
    report = write_report(write_run(tmp_path / "run", records))
    assert report.stat().st_size < 1_000_000
    # The axis of the loss reaches to the one spike, so it was not thinned away.
    assert "75" in re.findall(r">(\d+)</text>", report.read_text())


def test_command_renews_the_report_and_refuses_what_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = write_run(tmp_path / "run", partial_run())
    assert main([str(run_dir)]) == 0
    assert capsys.readouterr().out.strip() == str(run_dir / "report.html")
    assert main([str(tmp_path / "nothing")]) == 2
    assert "config.json" in capsys.readouterr().err
    (run_dir / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        write_report(run_dir)


def test_following_a_run_loads_nothing_heavy() -> None:
    code = (
        "import sys, train.console, train.progress, train.report, train.schedule, train.tracking\n"
        f"print([name for name in {NOT_LOADED} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
