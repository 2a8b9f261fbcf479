"""The models of stages before there are any, against what the stages would make."""

from check_samples import BIG_DISK, changed, composed, full_size

from conf.schema import ShapeConfig
from parallel.shapes import size_of
from recipes import check
from recipes.stage_models import model_of_stage, models_of, teacher_of_stage, training_of_stage

SHAPE = ShapeConfig(num_layers=40, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_kv_heads=4)


def resolved(**values):
    config = changed(full_size(), **values)
    return check.resolve(config, BIG_DISK)


def test_pruned_models_hold_their_target_and_are_trained_by_what_follows():
    config = resolved()
    models = models_of(config)
    assert 0.67 < size_of(models["prune"], "parameters") / size_of(config.model, "parameters") <= 0.7
    assert models["prune"] == models["prune_random"] == models["recover"] == models["quantise"]
    assert models["init"] == models["specialise"] == models["continued"] == config.model


def test_students_are_cut_from_their_teachers():
    config = resolved()
    assert teacher_of_stage(config, "distill") == teacher_of_stage(config, "recover") == config.model
    assert teacher_of_stage(config, "specialise") is None
    ratio = config.model.num_parameters / model_of_stage(config, "distill").num_parameters
    assert 9.5 < ratio < 10.5


def test_given_shapes_are_taken():
    config = resolved(stages__prune__shape=SHAPE, stages__distill__student__shape=SHAPE)
    for name in ("prune", "recover", "distill"):
        assert model_of_stage(config, name).hidden_size == 4096 and model_of_stage(config, name).num_layers == 40


def test_controls_do_not_change_what_comes_after_them():
    config = check.resolve(composed("business_module", "cluster=h200_ray", "controls=true"), BIG_DISK)
    models = models_of(config)
    assert models["recover_alone"] == models["recover_fresh"] == models["prune"] == models["recover"]
    assert models["student_alone"] == models["distill"]
    assert training_of_stage(config, "recover_alone") == config.stages["recover_alone"].training
    assert training_of_stage(config, "recover_alone_flops").tokens > config.stages["recover_alone"].training.tokens


def test_names_that_do_not_exist_do_not_stop_other_rules():
    config = resolved(stages__recover__distillation__teacher="nobody", stages__continued__model="continued")
    assert teacher_of_stage(config, "recover") == model_of_stage(config, "continued") == config.model
