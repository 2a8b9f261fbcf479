"""Overrides to a typed configuration, its faults, and config.json."""

import json
from dataclasses import replace
from functools import cache

import pytest

from conf import load
from conf.errors import ConfigError

OPTIM = "stages.specialise.training.optim"


@cache
def compose(*overrides):
    return load.compose(["recipe=business_module", *overrides])


def problems_of(*overrides, recipe="recipe=business_module", **options):
    """Path -> message."""
    with pytest.raises(ConfigError) as caught:
        load.compose([recipe, *overrides] if recipe else overrides, **options)
    paths = [problem.path for problem in caught.value.problems]
    assert len(set(paths)) == len(paths), f"a fault is told twice: {paths}"
    return {problem.path: problem.message for problem in caught.value.problems}


class TestScale:
    def test_this_machine_rehearses_and_a_cluster_runs_at_full_size(self):
        assert compose().scale == "rehearsal"
        assert compose("cluster=h200_ray").scale == "full"

    def test_typed_scale_wins_over_the_cluster(self):
        assert compose("scale=full").model.num_layers == 80
        assert compose("cluster=h200_ray", "scale=rehearsal").model.num_layers == 4

    def test_rehearsal_carries_what_it_rehearses(self):
        rehearsal, full = compose(), compose("scale=full")
        assert replace(rehearsal.full_size, overrides=full.overrides) == full
        assert full.full_size is None and rehearsal.full_size.full_size is None

    def test_typed_value_replaces_both_sizes(self):
        config = compose("stages.specialise.training.tokens=100e3", "model.num_layers=8")
        for each in (config, config.full_size):
            assert each.stages["specialise"].training.tokens == 100_000
            assert each.model.num_layers == 8

    def test_number_of_nodes_follows_the_budget(self):
        assert compose("cluster=h200_ray").cluster.num_nodes == 256 // 8


class TestValues:
    def test_whole_number_in_scientific_notation_is_a_count(self):
        tokens = compose("stages.specialise.training.tokens=6.5e5").stages["specialise"].training.tokens
        assert tokens == 650_000 and type(tokens) is int

    def test_float_field_stays_a_float(self):
        assert type(compose("budget.days=7").budget.days) is float

    def test_mixture_takes_a_new_source_without_a_plus(self):
        config = compose("stages.specialise.training.mixture.web=1", "data.sources.web.path=/web")
        assert config.stages["specialise"].training.mixture["web"] == 1.0
        assert config.data.sources["web"].path == "/web"

    def test_last_of_two_overrides_of_a_key_counts(self):
        assert compose("seed=1", "cluster=h200_ray", "seed=2", "cluster=local").seed == 2
        assert compose("cluster=h200_ray", "cluster=local").cluster.kind == "local"

    def test_schedule_is_swapped_as_a_group(self):
        config = compose("optim@stages.specialise.training.optim=wsd")
        assert config.stages["specialise"].training.optim.schedule == "wsd"

    def test_overrides_are_recorded_and_compose_the_same_again(self):
        config = compose("seed=7", "engine.mesh.tensor=2", "order=[specialise]")
        assert load.compose(config.overrides) == config


# Override, path of its fault, words of the message: what the decoder finds, all in one configuration.
WRONG = [
    ("modle=x", "modle", ["no key 'modle'", "Did you mean 'model'"]),
    ("recip=x", "recip", ["Did you mean 'recipe'"]),
    ("engine.mesh.tensr=2", "engine.mesh.tensr", ["'engine.mesh' has no key 'tensr'", "Did you mean 'tensor'"]),
    ("model.colour=red", "model.colour", ["no key 'colour'", "It has name, num_layers"]),
    ("stages.specialise.trainin.tokens=1", "stages.specialise.trainin.tokens", ["Did you mean 'training'"]),
    ("optim.warmup_fraction=1", "optim.warmup_fraction", ["'stages.specialise.training.optim.warmup_fraction'"]),
    ("stages.specialize.training.tokens=1", "stages.specialize", ["no stage", "Did you mean 'specialise'"]),
    ("stages.export.kind=exprt", "stages.export.kind", ["'exprt'", "Did you mean 'export'"]),
    ("stages.evaluate=null", "stages.evaluate", ["is null", "must be a mapping"]),
    ("seed=-1", "seed", ["is -1", "at least 0"]),
    ("engine.mesh.pipeline=1.5", "engine.mesh.pipeline", ["is 1.5", "whole number"]),
    ("engine.mesh.context=true", "engine.mesh.context", ["is true", "whole number"]),
    ("engine.mesh.tensor=0", "engine.mesh.tensor", ["is 0", "at least 1"]),
    ("engine.mesh.data.x=1", "engine.mesh.data", ["is a mapping", "whole number"]),
    ("stages.specialise.training.tokens=12B", "stages.specialise.training.tokens", ["'12B'", "e.g. 4096 or 60e9"]),
    ("engine.overlap=1", "engine.overlap", ["is 1", "true or false"]),
    (
        "engine.precision=bf61",
        "engine.precision",
        ["must be 'fp32', 'bf16', 'fp8' or 'fp8_rowwise'", "Did you mean 'bf16'"],
    ),
    ("action=chek", "action", ["'run', 'check', 'plan' or 'dry_run'", "Did you mean 'check'"]),
    ("scale=ful", "scale", ["'rehearsal' or 'full'", "Did you mean 'full'"]),
    ("runs_dir=null", "runs_dir", ["is null", "must be text"]),
    ("order=specialise", "order", ["must be a list", "[specialise,export]"]),
    ("data.held_out_fraction=0.5", "data.held_out_fraction", ["less than 0.5"]),
    ("model.rope_theta=inf", "model.rope_theta", ["is inf", "finite"]),
    ("model.vocab_size=nan", "model.vocab_size", ["is nan", "whole number"]),
    (f"{OPTIM}.learning_rate=nan", f"{OPTIM}.learning_rate", ["is nan", "finite"]),
    (f"{OPTIM}.beta1=1", f"{OPTIM}.beta1", ["is 1", "less than 1"]),
    (f"{OPTIM}.warmup_fraction=1.2", f"{OPTIM}.warmup_fraction", ["is 1.2", "at most 1"]),
]
# What Hydra itself refuses, or what cannot even be resolved.
REFUSED = [
    ("overrides=[a]", "overrides", ["cannot be given"]),
    ("budget.gpus=255 cluster=h200_ray", "cluster.num_nodes", ["255 cannot be divided by 8"]),
    ("model=fronter", "model", ["no model 'fronter'", "Did you mean 'frontier_70b'", "Choose from"]),
    ("seed=1,2", "seed", ["several values", "-m", "seed=[1,2]"]),
    ("~stages.none", "", ["stages.none", "does not exist"]),
]


class TestFaults:
    @pytest.fixture(scope="class")
    def found(self):
        return problems_of(*(override for override, _, _ in WRONG))

    @pytest.mark.parametrize(("override", "path", "words"), WRONG, ids=[override for override, _, _ in WRONG])
    def test_is_told_with_its_path_and_what_would_be_right(self, override, path, words, found):
        for word in words:
            assert word in found[path]

    def test_nothing_else_is_told(self, found):
        # The configuration that stages.evaluate=null leaves behind is not searched for what it then lacks.
        assert set(found) == {path for _, path, _ in WRONG}

    @pytest.mark.parametrize(("overrides", "path", "words"), REFUSED, ids=[overrides for overrides, _, _ in REFUSED])
    def test_what_hydra_refuses_is_told_the_same_way(self, overrides, path, words):
        problems = problems_of(*overrides.split())
        assert list(problems) == [path]
        for word in words:
            assert word in problems[path]

    def test_missing_recipe_lists_the_recipes(self):
        message = problems_of(recipe=None)["recipe"]
        assert "missing" in message and "business_module, creative_module" in message

    def test_recipe_without_its_key_is_understood(self):
        problems = problems_of("business_module", recipe=None)
        assert "Did you mean recipe=business_module" in problems["business_module"]

    def test_unknown_recipe_lists_the_recipes_and_the_nearest(self):
        message = problems_of(recipe="recipe=busines_module")["recipe"]
        assert "Did you mean 'business_module'" in message and "foundation" in message

    def test_all_are_told_at_once(self):
        problems = problems_of(
            "modle=x", "model=fronter", "seed=1.5", "engine.mesh.tensor=0", "a b", recipe="recipe=busines_module"
        )
        assert set(problems) == {"recipe", "modle", "model", "seed", "engine.mesh.tensor", "a b"}

    def test_of_full_size_alone_says_so(self):
        path = "stages.specialise.training.tokens"
        message = problems_of(path + "=${scaled:1.5,8192}")[path]
        assert message.startswith("at scale=full") and "whole number" in message


class TestPrivateRecipes:
    @pytest.fixture
    def config_dir(self, tmp_path):
        (tmp_path / "recipe").mkdir()
        text = "# @package _global_\ndefaults: [business_module, _self_]\nname: mine\norder: [specialise]\n"
        (tmp_path / "recipe" / "mine.yaml").write_text(text)
        return tmp_path

    def test_extends_ours(self, config_dir):
        config = load.compose(["recipe=mine"], config_dir=config_dir)
        assert (config.name, config.order) == ("mine", ("specialise",))
        assert config.stages == compose().stages

    def test_is_listed(self, config_dir):
        assert "mine" in load.recipe_names(config_dir)
        problems = problems_of(recipe="recipe=min", config_dir=config_dir)
        assert "Did you mean 'mine'" in problems["recipe"]

    def test_with_a_typo_inside_is_refused(self, config_dir):
        with (config_dir / "recipe" / "mine.yaml").open("a") as file:
            file.write("budgte: {days: 1}\n")
        problems = problems_of(recipe="recipe=mine", config_dir=config_dir)
        assert "Did you mean 'budget'" in problems["budgte.days"]

    def test_that_is_not_yaml_is_refused(self, config_dir):
        (config_dir / "recipe" / "mine.yaml").write_text("a: [1\n")
        assert "mine.yaml" in problems_of(recipe="recipe=mine", config_dir=config_dir)[""]

    def test_directory_that_is_not_there_is_named(self, tmp_path):
        assert str(tmp_path / "no") in problems_of(config_dir=tmp_path / "no")["--config-dir"]


class TestComposeLike:
    def test_takes_everything_but_the_recipe_along(self, tmp_path):
        config = compose("model.num_layers=2", "engine.mesh.tensor=2", f"runs_dir={tmp_path}", "seed=5", "order=[]")
        origin = load.compose_like(config, "foundation")
        assert origin.name == "foundation" and origin.order == ("pretrain", "evaluate", "export")
        for field in ("model", "engine", "data", "cluster", "tracking", "runs_dir", "seed", "scale"):
            assert getattr(origin, field) == getattr(config, field)
        assert load.compose(origin.overrides) == origin


class TestConfigJson:
    def test_reads_back_equal(self, tmp_path):
        config = compose("tracking.tags=[a,b]", "cluster.node_labels.pod=p3")
        load.write(config, tmp_path / "config.json")
        assert load.read(tmp_path / "config.json") == config

    def test_every_fault_is_named_with_the_file(self, tmp_path):
        file = tmp_path / "config.json"
        load.write(compose(), file)
        values = json.loads(file.read_text())
        values["seed"] = "1"
        values["engine"]["mesh"]["tensor"] = 2.0
        del values["model"]["num_layers"]
        file.write_text(json.dumps(values))
        with pytest.raises(ConfigError) as caught:
            load.read(file)
        assert {problem.path for problem in caught.value.problems} == {
            f"{file}: seed",
            f"{file}: engine.mesh.tensor",
            f"{file}: model.num_layers",
        }

    @pytest.mark.parametrize(("content", "word"), [(None, "cannot be read"), ("{", "not JSON")])
    def test_missing_or_broken_file_is_named(self, content, word, tmp_path):
        file = tmp_path / "config.json"
        if content is not None:
            file.write_text(content)
        with pytest.raises(ConfigError, match=word) as caught:
            load.read(file)
        assert str(file) in str(caught.value)
