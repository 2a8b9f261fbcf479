"""Rules of pruning and distillation: what each refuses, and in which words."""

import pytest
from check_samples import BIG_DISK, FOUR_GPUS, LAPTOP, assert_told, changed, full_size, layout, problems_of, rehearsal

from conf import load
from conf.errors import ConfigError
from conf.schema import ShapeConfig
from recipes import check
from recipes.rules_compression import distilling_bytes
from recipes.stage_models import models_of

SHAPE = ShapeConfig(num_layers=4, hidden_size=96, ffn_hidden_size=256, num_attention_heads=4, num_kv_heads=2)


@pytest.mark.parametrize("recipe", ["business_module", "development_module", "creative_module"])
def test_shipped_recipes_are_sound_at_both_sizes_and_with_all_controls(recipe):
    for controls in (False, True):
        assert problems_of(changed(rehearsal(recipe), controls=controls)) == {}
        found = problems_of(full_size(recipe, controls=controls), BIG_DISK)
        assert not [path for path in found if path.startswith(("stages", "engine", "order"))], found


@pytest.mark.parametrize("removed", ["0", "1", "1.5", "-0.3"])
def test_ratio_is_between_0_and_1(removed):
    with pytest.raises(ConfigError, match=r"stages\.prune\.search\.removed"):
        load.compose(["recipe=business_module", f"stages.prune.search.removed={removed}"])


@pytest.mark.parametrize("ratio", ["1", "0.5", "-10", "inf"])
def test_a_student_is_smaller_than_its_teacher(ratio):
    with pytest.raises(ConfigError, match=r"stages\.distill\.student\.ratio"):
        load.compose(["recipe=business_module", f"stages.distill.student.ratio={ratio}"])


def test_deep_cuts_are_made_in_several_prune_and_recover_stages():
    """Each round cuts what the round before recovered, and is checked against that model's size."""
    rounds = ("prune", "recover", "prune_more", "recover_more")
    stages = rehearsal().stages
    config = rehearsal(
        stages__prune_more=stages["prune"],
        stages__recover_more=changed(stages["recover"], distillation__teacher="recover"),
        order=("specialise", *rounds, "evaluate"),
        stages__evaluate__models=("specialise", *rounds[1::2]),
        stages__evaluate__ngram_models=(),
        stages__evaluate__comparisons={},
        stages__evaluate__targets={},
    )
    assert problems_of(config) == {}
    sizes = [models_of(config)[name].num_parameters for name in ("specialise", "recover", "recover_more")]
    assert sizes[1] <= 0.7 * sizes[0] and sizes[2] <= 0.7 * sizes[1]


def test_a_ratio_no_shape_holds_is_refused_with_the_most_that_can_go():
    config = rehearsal(stages__prune__search__removed=0.9)
    assert_told(config, "stages.prune.search.removed", "no shape", "Most that can go", "several prune and recover")


def test_a_grid_without_smaller_shapes_is_refused():
    config = rehearsal(stages__prune__search__hidden_multiple=1024, stages__prune__search__ffn_multiple=1024)
    config = changed(config, stages__prune__search__cut="depth", model__num_layers=1)
    assert_told(config, "stages.prune.search.removed", "smaller hidden_multiple")


def test_deep_cuts_are_warned_of():
    config = rehearsal(stages__prune__search__removed=0.55, stages__prune__search__cut="mixed")
    assert any("several stages" in warning.message for warning in check.warnings(config, LAPTOP))


@pytest.mark.parametrize(
    ("field", "size", "words"),
    [
        ("hidden_size", 98, ["Hugging Face's Llama", "96 or 100"]),
        ("num_kv_heads", 3, ["cannot share", "1, 2, 4"]),
        ("num_layers", 3, ["pipeline", "2 or 4"]),
        ("ffn_hidden_size", 255, ["tensor ranks", "254 or 256"]),
        ("ffn_hidden_size", 1000, ["more than model.ffn_hidden_size=384"]),
    ],
)
@pytest.mark.parametrize("where", ["prune.shape", "distill.student.shape"])
def test_shapes_that_cannot_be_sharded_or_exported_are_refused(where, field, size, words):
    shape = changed(SHAPE, **{field: size})
    config = layout(rehearsal(), tensor=2, pipeline=2)
    config = changed(config, **{f"stages__{where.replace('.', '__')}": shape})
    assert_told(config, f"stages.{where}.{field}", *words)


@pytest.mark.parametrize(
    ("order", "path"),
    [
        (("prune", "recover", "specialise"), "stages.recover.distillation.teacher"),
        (("distill", "specialise"), "stages.distill.distillation.teacher"),
        (("specialise", "prune_random", "prune"), "stages.prune_random.shape_of"),
        (("specialise", "quantise", "prune", "recover"), "stages.quantise.model"),
        (("continued", "specialise"), "stages.continued.model"),
    ],
)
def test_models_are_named_after_they_are_made(order, path):
    assert_told(rehearsal(order=order), path, "no stage before", "comes after")


def test_flops_are_those_of_a_stage_with_a_teacher():
    config = rehearsal(stages__continued__flops_of="specialise")
    assert_told(config, "stages.continued.flops_of", "no teacher")


def test_smoothing_is_for_rounded_inputs():
    config = rehearsal(stages__quantise__scheme="w8a16")
    assert_told(config, "stages.quantise.smoothing", "leaves them as they are", "null")


def test_speed_is_measured_of_exported_models_whose_context_holds_it():
    assert_told(rehearsal(stages__export__speed_prompt_tokens=120), "stages.export.speed_prompt_tokens", "112 at most")
    config = rehearsal(stages__export__models=("specialise", "recover"))
    assert_told(config, "stages.evaluate.targets.INT8: speed", "'quantise' is not among them")


def test_calibration_is_not_empty_and_of_known_sources():
    path = "stages.prune.calibration.mixture"
    assert_told(rehearsal(stages__prune__calibration__mixture={}), path, "is empty")
    assert_told(rehearsal(stages__prune__calibration__mixture={"busines": 1.0}), path, "Did you mean 'business'")


def test_calibration_rows_are_shared_evenly_and_fit_the_model():
    config = layout(rehearsal(stages__prune__calibration__tokens=1280), data=2)
    assert_told(config, "stages.prune.calibration.tokens", "10 rows of 128", "2 data ranks", "2048 tokens")
    config = rehearsal(stages__prune__calibration__sequence_length=256)
    assert_told(config, "stages.prune.calibration.sequence_length", "max_sequence_length=128")
    config = layout(rehearsal(stages__prune__calibration__sequence_length=126), context=2)
    assert_told(config, "stages.prune.calibration.sequence_length", "over 2 context ranks;", "Nearest: 124 or 128")


def test_no_more_logits_are_kept_than_there_are():
    config = rehearsal(stages__recover__distillation__top_k=2000)
    assert_told(config, "stages.recover.distillation.top_k", "vocabulary has 1024")


def test_targets_are_about_models_that_are_evaluated_and_have_one_limit():
    target = rehearsal().stages["evaluate"].targets["pruning: accuracy kept"]
    spoilt = {"x": changed(target, model="prune_magnitude2", at_most=1.0, source="busines")}
    config = rehearsal(stages__evaluate__targets=spoilt)
    assert_told(config, "stages.evaluate.targets.x", "one of them", "is not evaluated", "not among the models")


def test_a_student_smaller_than_any_shape_is_refused():
    config = rehearsal(stages__distill__student__ratio=1000.0)
    assert_told(config, "stages.distill.student.ratio", "smallest shape", "smaller ratio")


def test_a_teacher_that_does_not_fit_beside_its_student_is_told_with_what_would():
    config = layout(full_size(), tensor=2, data=128)
    assert_told(config, "stages.recover.distillation.teacher", "the teacher's weights", "tensor=", machine=BIG_DISK)
    config = full_size()
    assert distilling_bytes(config_on_mesh(config), "distill") < 141e9


def config_on_mesh(config):
    return check.resolve(config, FOUR_GPUS)
