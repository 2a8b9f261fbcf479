"""Rules between stages and what they name: what each refuses, and in which words."""

from dataclasses import replace

import pytest
from check_samples import LAPTOP, assert_told, composed, rehearsal

from recipes import check


def test_order_is_not_empty():
    assert_told(rehearsal(order=()), "order", "empty", "specialise, prune")


def test_order_names_stages():
    assert_told(rehearsal(order=("specialize", "export")), "order", "no stage", "Did you mean 'specialise'")


def test_a_stage_runs_once():
    assert_told(rehearsal(order=("specialise", "export", "export")), "order", "'export' comes 2 times")


@pytest.mark.parametrize("order", [("specialise",), ("evaluate",), ("export",)])
def test_a_first_stage_needs_a_model(order):
    assert_told(rehearsal(order=order, init=None), "init", order[0], "init=recipe:foundation")


def test_pretraining_does_not_start_from_a_model():
    assert_told(rehearsal("foundation", init="recipe:business_module"), "init", "fresh weights", "init=null")


def test_pretraining_comes_first():
    pretrain = composed("foundation").stages["pretrain"]
    config = rehearsal(order=("specialise", "pretrain"), stages__pretrain=pretrain)
    assert_told(config, "order", "'pretrain'", "only come first")


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ((), ["empty", "[init,specialise,prune,"]),
        (("export",), ["not a stage that makes a model", "[init,specialise,prune,"]),
        (("specialize",), ["no stage 'specialize'", "Did you mean 'specialise'"]),
        (("init", "init"), ["'init' comes 2 times"]),
    ],
)
def test_evaluated_models_exist(models, words):
    assert_told(rehearsal(stages__evaluate__models=models), "stages.evaluate.models", *words)


def test_evaluated_models_come_before():
    config = rehearsal(order=("evaluate", "specialise"))
    assert_told(config, "stages.evaluate.models", "'specialise' is not a stage that makes a model before")


def test_init_is_evaluated_only_where_there_is_one():
    config = rehearsal("foundation", stages__evaluate__models=("init", "pretrain"))
    assert_told(config, "stages.evaluate.models", "init is null", "Possible here: [pretrain]")


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"stages__specialise__training__mixture": {"busines": 1.0}}, "stages.specialise.training.mixture"),
        ({"stages__evaluate__sources": ("busines",)}, "stages.evaluate.sources"),
    ],
)
def test_sources_exist(values, path):
    assert_told(rehearsal(**values), path, "no source 'busines'", "Did you mean 'business'")


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"stages__specialise__training__mixture": {}}, "stages.specialise.training.mixture"),
        ({"stages__evaluate__sources": ()}, "stages.evaluate.sources"),
    ],
)
def test_sources_are_named(values, path):
    assert_told(rehearsal(**values), path, "empty", "business, development, creative")


def test_warm_up_and_decay_leave_room_for_each_other():
    optim = replace(
        rehearsal().stages["specialise"].training.optim, schedule="wsd", warmup_fraction=0.5, decay_fraction=0.75
    )
    path = "stages.specialise.training.optim.decay_fraction"
    assert_told(rehearsal(stages__specialise__training__optim=optim), path, "at most 1", "Largest", "0.5")


def test_tokens_make_a_step():
    config = rehearsal(stages__specialise__training__tokens=1023)
    assert_told(config, "stages.specialise.training.tokens", "8 x 128 = 1024")


@pytest.mark.parametrize("path", ["stages.specialise.training.validation_tokens", "stages.evaluate.tokens"])
def test_held_out_tokens_make_a_sequence(path):
    assert_told(rehearsal(**{path.replace(".", "__"): 127}), path, "less than one sequence of 128")


def test_stages_left_out_are_warned_of():
    told = " ".join(warning.message for warning in check.warnings(rehearsal(order=("specialise", "export")), LAPTOP))
    assert "'evaluate', which will not run" in told and "'recover'" in told
    assert "'continued'" not in told, "what is compared with is left out unless controls are asked for"
    told = " ".join(warning.message for warning in check.warnings(rehearsal(controls=True), LAPTOP))
    assert "'recover_alone'" in told
