from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_run import finished_run, partial_run, write_run

from train.metrics import read
from train.summary import RunSummary, exceeds_noise, summarise


def summary_of(run_dir: Path, records: list[dict[str, object]]) -> RunSummary:
    return summarise(read(write_run(run_dir, records) / "metrics.jsonl"))


@pytest.fixture
def finished(tmp_path: Path) -> RunSummary:
    return summary_of(tmp_path, finished_run())


def test_a_resumed_run_adds_up_over_its_attempts_without_the_pause_between(finished: RunSummary) -> None:
    assert finished.status == "finished"
    assert finished.exit_code == 0
    assert finished.seconds == 190.0 + 93.0
    specialise = finished.stages[1]
    assert specialise.name == "specialise"
    assert specialise.done
    assert [step["step"] for step in specialise.steps] == list(range(1, 121))
    # The second attempt took 66 s by its own word; the first is known by its records: 70 steps of about 0.9 s.
    assert specialise.seconds == pytest.approx(66 + 70 * 0.9 + 3 * 1.2, rel=0.1)


def test_a_run_that_began_again_is_running(tmp_path: Path) -> None:
    records = finished_run()
    restart = next(number for number, record in enumerate(records) if record.get("restarts") == 1)
    assert summary_of(tmp_path / "stopped", records[:restart]).status == "stopped"
    assert summary_of(tmp_path / "again", records[: restart + 5]).status == "running"


def test_an_unfinished_stage_is_not_done(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, partial_run())
    assert summary.status == "failed"
    assert [stage.done for stage in summary.stages] == [False]


def test_newest_validation_of_each_source_counts(finished: RunSummary) -> None:
    newest = finished.stages[0].last_validations
    assert [(each["source"], each["step"]) for each in newest] == [("business", 120), ("creative", 120)]


def test_baselines_come_last_and_are_told_from_models(finished: RunSummary) -> None:
    assert finished.models == ["init", "pretrain", "specialise", "unigram", "bigram"]
    assert [finished.is_baseline(model) for model in finished.models] == [False, False, False, True, True]


def test_an_evaluation_that_was_repeated_counts_once(tmp_path: Path) -> None:
    records = finished_run()
    repeated = [{**record, "loss": 1.0} for record in records if record["kind"] == "evaluation"]
    summary = summary_of(tmp_path, records + repeated)
    assert len(summary.evaluations) == len(repeated)
    assert {each["loss"] for each in summary.evaluations} == {1.0}


def test_a_gain_counts_from_three_standard_errors_on(finished: RunSummary) -> None:
    assert [exceeds_noise(each) for each in finished.comparisons] == [True, True, True, False]


def test_no_records_are_a_run_of_nothing() -> None:
    summary = summarise([])
    assert (summary.started, summary.stages, summary.seconds) == (None, [], 0.0)
