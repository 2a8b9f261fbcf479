"""The search and the rules know the same layouts; what is said to fit does."""

from dataclasses import replace
from itertools import product
from random import Random

from check_samples import BIG_DISK, composed, full_size

from parallel.plan.operations import site_gpu
from parallel.plan.search import layouts
from recipes import check, fit

CONFIG = check.resolve(full_size(), BIG_DISK)
GPU = site_gpu(CONFIG.cluster.hardware)


def test_every_layout_of_the_search_is_allowed_by_the_rules():
    found = list(layouts(fit.task_of(CONFIG, "specialise", GPU)))
    for layout in Random(0).sample(found, 150):
        assert fit.refusal(CONFIG, "specialise", layout) is None, layout


def test_every_layout_that_the_rules_allow_is_in_the_search():
    task = fit.task_of(CONFIG, "specialise", GPU)
    known = {fit.with_layout(CONFIG, "specialise", layout).engine.mesh for layout in layouts(task)}
    now = fit.layout_of_stage(CONFIG, "specialise")
    allowed = 0
    for tensor, context, pipeline, virtual in product((1, 2, 3, 4, 8), (1, 2, 3, 4), (1, 2, 3, 4, 5, 8), (1, 2, 5)):
        data, left = divmod(256, tensor * context * pipeline)
        layout = replace(
            now,
            tensor=tensor,
            context=context,
            pipeline=pipeline,
            virtual_pipeline=virtual,
            data=max(data, 1),
            micro_batch=1,
            sequence_parallel=tensor > 1,
        )
        if not left and fit.refusal(CONFIG, "specialise", layout) is None:
            allowed += 1
            assert fit.with_layout(CONFIG, "specialise", layout).engine.mesh in known, layout
    assert allowed > 20


def test_a_layout_comes_back_from_the_configuration_it_makes():
    for layout in Random(1).sample(list(layouts(fit.task_of(CONFIG, "specialise", GPU))), 20):
        assert fit.layout_of_stage(fit.with_layout(CONFIG, "specialise", layout), "specialise") == layout


def test_overrides_are_those_that_differ():
    now = fit.layout_of_stage(CONFIG, "specialise")
    assert fit.overrides_to(CONFIG, "specialise", now) == ""
    other = replace(now, tensor=2, recompute="mlp", micro_batch=2)
    assert fit.overrides_to(CONFIG, "specialise", other) == (
        "engine.mesh.tensor=2 engine.recompute=selective stages.specialise.training.micro_batch=2"
    )


def test_rehearsals_have_the_shape_they_train():
    config = composed("foundation")
    assert fit.shape_of_stage(config, "pretrain").num_parameters == config.model.num_parameters


def test_layouts_that_would_change_a_student_are_not_proposed():
    now = fit.layout_of_stage(CONFIG, "specialise")
    deep = replace(now, virtual_pipeline=20)
    assert fit.refusal(CONFIG, "specialise", deep) is None
    assert fit.refusal_in_place(CONFIG, "specialise", deep) == "models"
    assert fit.refusal_in_place(CONFIG, "specialise", now) is None
