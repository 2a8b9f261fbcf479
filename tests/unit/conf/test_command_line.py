"""`load.main`: exit codes, sweeps, help, and what is imported on the way."""

import subprocess
import sys

import pytest

from conf import load
from conf.errors import UserError


@pytest.fixture
def command_line(monkeypatch, tmp_path, capsys):
    """`command_line(arguments, run)` -> (exit code, standard output, standard error); in an empty directory."""
    monkeypatch.chdir(tmp_path)
    # Set by main for the life of a process; here it ends with the test.
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def call(arguments, run=lambda config: 0):
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        with pytest.raises(SystemExit) as caught:
            load.main(run)
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err

    return call


@pytest.mark.parametrize("code", [0, 75])
def test_run_gets_what_compose_gives_and_its_code_is_the_exit_code(code, command_line):
    seen = []
    arguments = ["recipe=foundation", "seed=3", "stages.pretrain.training.mixture.creative=2"]
    assert command_line(arguments, lambda config: seen.append(config) or code)[0] == code
    assert seen == [load.compose(arguments)]


def test_user_error_of_the_run_is_printed_and_exits_with_2(command_line):
    def run(config):
        raise UserError("the disk is full; free some")

    assert command_line(["recipe=foundation"], run) == (2, "", "error: the disk is full; free some\n")


def test_other_errors_of_the_run_are_not_hidden(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["train", "recipe=foundation"])
    with pytest.raises(ZeroDivisionError):
        load.main(lambda config: 1 // 0)


def test_faults_exit_with_2_before_anything_runs_or_is_written(command_line, tmp_path):
    code, out, err = command_line(["recipe=foundation", "sed=1", "model=x"], lambda config: pytest.fail("it ran"))
    assert (code, out) == (2, "")
    assert "2 problems" in err and "Did you mean 'seed'?" in err and "no model 'x'" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


class TestSweep:
    def test_runs_every_job_and_ends_with_the_code_of_one_that_failed(self, command_line):
        seen = []
        code, _, _ = command_line(
            ["-m", "recipe=foundation,business_module", "seed=2"],
            lambda config: seen.append((config.name, config.overrides)) or int(config.name == "foundation"),
        )
        assert code == 1
        assert seen == [(name, (f"recipe={name}", "seed=2")) for name in ("foundation", "business_module")]

    def test_ends_with_a_stopped_job(self, command_line):
        seen = []
        code, _, _ = command_line(["-m", "recipe=foundation", "seed=1,2"], lambda c: seen.append(c.seed) or 75)
        assert (code, seen) == (75, [1])

    def test_starts_no_job_where_one_is_faulty(self, command_line):
        code, _, err = command_line(["-m", "recipe=foundation", "seed=1,x"], lambda config: pytest.fail("it ran"))
        assert code == 2 and "seed: is 'x'" in err

    def test_without_a_recipe_is_refused(self, command_line):
        code, _, err = command_line(["-m", "seed=1,2"])
        assert code == 2 and "recipe: is missing" in err

    def test_record_that_cannot_be_written_is_refused(self, command_line, tmp_path):
        (tmp_path / "file").touch()
        code, _, err = command_line(["-m", "recipe=foundation", "seed=1,2", "runs_dir=file/runs"])
        assert code == 2 and "runs_dir" in err and "Traceback" not in err


class TestOptions:
    def test_help_lists_recipes_with_their_descriptions(self, command_line):
        code, out, _ = command_line(["--help"])
        assert code == 0
        for recipe in load.recipe_names():
            assert load.compose([f"recipe={recipe}"]).description in out
        assert "cluster=h200_ray" in out and "resume=latest" in out

    def test_help_needs_no_sound_configuration(self, command_line):
        assert command_line(["--help", "recipe=none", "sed=1"])[0] == 0

    def test_cfg_prints_both_sizes(self, command_line):
        code, out, _ = command_line(["--cfg", "job", "recipe=foundation", "seed=8"])
        assert code == 0 and "num_layers: ${scaled:80,4}" in out and "seed: 8" in out

    def test_cfg_resolves(self, command_line):
        out = command_line(["--cfg", "job", "--resolve", "recipe=foundation"])[1]
        assert "num_layers: 4" in out and "${" not in out

    def test_cfg_of_a_faulty_configuration_is_refused(self, command_line):
        code, out, err = command_line(["--cfg", "job", "recipe=foundation", "sed=1"])
        assert (code, out) == (2, "") and "Did you mean 'seed'?" in err

    def test_config_dir_brings_private_recipes(self, command_line, tmp_path):
        (tmp_path / "mine" / "recipe").mkdir(parents=True)
        (tmp_path / "mine" / "recipe" / "own.yaml").write_text(
            "# @package _global_\ndefaults: [foundation, _self_]\nname: own\ndescription: Of my own\n"
        )
        seen = []
        assert command_line(["--config-dir", "mine", "recipe=own"], lambda c: seen.append(c.name) or 0)[0] == 0
        assert seen == ["own"]
        assert "Of my own" in command_line(["--help", "--config-dir", "mine"])[1]
        # A run can ask for other recipes of the directory, too.
        command_line(["--config-dir", "mine", "recipe=foundation"], lambda c: "own" not in load.recipe_names())

    def test_config_dir_that_is_not_there_is_named(self, command_line):
        code, _, err = command_line(["--config-dir", "no", "recipe=foundation"])
        assert code == 2 and "--config-dir: there is no directory no" in err


HEAVY = ("torch", "ray", "megatron", "deepspeed", "wandb", "transformers", "matplotlib")


@pytest.mark.parametrize(("extra", "code"), [([], 0), (["sed=1", "model=x"], 2)])
def test_configuration_is_checked_without_heavy_imports(extra, code, tmp_path):
    program = f"""
import sys
from conf import load

def run(config):
    from recipes import check
    from recipes.machine import find_machine
    machine = find_machine()
    check.check(check.resolve(config, machine), machine)
    return 0

try:
    load.main(run)
finally:
    print([name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program, "recipe=business_module", "action=check", *extra],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, "[]\n"), done.stderr


def test_reading_config_json_needs_no_hydra(tmp_path):
    load.write(load.compose(["recipe=foundation"]), tmp_path / "config.json")
    program = "import sys; from pathlib import Path; from conf import load; load.read(Path(sys.argv[1]))"
    program += "; print('hydra' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "config.json")], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
