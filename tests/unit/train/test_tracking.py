from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_run import finished_run, write_run

from train.metrics import read
from train.tracking import Tracker, curve_values, resolved_mode

SERVER = "https://api.wandb.ai"


def test_auto_is_online_exactly_where_a_key_is_at_hand(tmp_path: Path) -> None:
    nothing = {"NETRC": str(tmp_path / "none")}
    assert resolved_mode("auto", base_url=SERVER, environment=nothing) == "offline"
    assert resolved_mode("auto", base_url=SERVER, environment={**nothing, "WANDB_API_KEY": "k"}) == "online"
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password k\n")
    assert resolved_mode("auto", base_url=SERVER, environment={"NETRC": str(netrc)}) == "online"
    netrc.write_text("machine example.org login user password k\n")
    assert resolved_mode("auto", base_url=SERVER, environment={"NETRC": str(netrc)}) == "offline"


@pytest.mark.parametrize("asked", ["online", "offline"])
def test_a_mode_that_was_asked_for_wins(asked: str) -> None:
    environment = {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}
    assert resolved_mode(asked, base_url=SERVER, environment=environment) == asked


def test_wandb_mode_of_the_environment_decides_auto() -> None:
    environment = {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}
    assert resolved_mode("auto", base_url=SERVER, environment=environment) == "offline"


def test_curves_have_wandb_names_and_their_step(tmp_path: Path) -> None:
    records = read(write_run(tmp_path / "run", finished_run()) / "metrics.jsonl")
    for record in records:
        if record["kind"] == "step":
            values = curve_values(record)
            assert values["train/step"] == record["step"]
            assert values["train/loss"] == record["loss"]
            assert values["performance/tokens_per_second"] == record["tokens_per_second"]
            assert "performance/mfu" not in values
        elif record["kind"] == "validation":
            assert curve_values(record)[f"validation/{record['source']}/loss"] == record["loss"]


def test_disabled_tracking_starts_nothing(tmp_path: Path) -> None:
    Tracker(tmp_path, mode="disabled").finish(0)
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_cannot_start_says_so_and_does_not_raise(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("in the way")
    Tracker(tmp_path, mode="auto").finish(0)
    (record,) = read(tmp_path / "metrics.jsonl")
    assert record["kind"] == "message" and record["level"] == "warning"
