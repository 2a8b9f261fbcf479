"""`python -m train.checkpoint`: exit codes, and that damage is named."""

from __future__ import annotations

import pytest
from checkpoint_samples import sample_tensors, save_alone

from train.checkpoint import main


@pytest.fixture
def run_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    for step in (1, 2):
        save_alone(tmp_path / "stages/pretrain/checkpoints", step, sample_tensors())
    return tmp_path


def test_list_shows_every_checkpoint_of_a_run(run_directory, capsys):
    assert main(["list", str(run_directory)]) == 0
    shown = capsys.readouterr().out
    assert "step-00000001" in shown and "step-00000002" in shown and shown.count("complete") == 2


def test_list_names_what_is_damaged(run_directory, capsys):
    broken = run_directory / "stages/pretrain/checkpoints/step-00000002/manifest.json"
    broken.write_bytes(broken.read_bytes().replace(b'"step":2', b'"step":3'))
    assert main(["list", str(run_directory)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("complete") == 1 and "damaged" in shown


def test_show_prints_provenance_and_tensors(run_directory, capsys):
    assert main(["show", str(run_directory / "stages/pretrain/checkpoints/step-00000002")]) == 0
    shown = capsys.readouterr().out
    assert "tiny_module" in shown and "model.embed_tokens.weight" in shown and "12 x 8" in shown


def test_verify_exits_1_and_names_the_damage(run_directory, capsys):
    assert main(["verify", str(run_directory)]) == 0
    assert "2 of 2 intact" in capsys.readouterr().out
    data = run_directory / "stages/pretrain/checkpoints/step-00000001/weights/rank-00000.safetensors"
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    assert main(["verify", str(run_directory)]) == 1
    shown = capsys.readouterr().out
    assert "1 of 2 intact" in shown and "step-00000001/weights/rank-00000.safetensors: tensor" in shown


@pytest.mark.parametrize("command", ["list", "show", "verify"])
def test_path_without_a_checkpoint_exits_2(tmp_path, command, capsys):
    assert main([command, str(tmp_path / "nowhere")]) == 2
    assert "error:" in capsys.readouterr().err
