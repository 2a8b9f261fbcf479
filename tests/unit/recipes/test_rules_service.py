"""Teachers on ranks of their own: which ranks those are, what is refused, and what the plan says of them."""

from dataclasses import replace

import pytest
from check_samples import FOUR_GPUS, LAPTOP, assert_told, changed, composed, full_size, problems_of, rehearsal

from conf.schema import HiddenStatesConfig, MeshConfig, ServiceConfig
from parallel.plan.hardware import gpu_named
from recipes import chain, check, fit
from recipes.driver import worlds_of
from recipes.plan import stage_plan
from recipes.plan_table import model_of, waiting_of
from recipes.reopen import computed

SERVICE = ServiceConfig(mesh=MeshConfig())
WIDE = ServiceConfig(mesh=MeshConfig(tensor=2))
DISTILLATION = "stages__distill__distillation__"


def served(service=SERVICE, **values):
    values = {f"{DISTILLATION}service": service, f"{DISTILLATION}top_k": 16} | values
    return changed(rehearsal(), **values)


def test_a_teachers_ranks_come_after_the_students_and_are_part_of_the_machine():
    config = check.resolve(served(), LAPTOP)
    assert problems_of(config) == {}
    assert (config.engine.mesh.data, config.cluster.ranks_per_node) == (1, 2), "of two cores, one is the teacher's"
    assert check.resolve(config, LAPTOP) == config
    students, teacher = worlds_of(check.resolve(served(WIDE, engine__mesh__data=2), LAPTOP))
    assert (students.size, students.engine, teacher.size) == (2, None, 2)
    assert teacher.engine.mesh == MeshConfig(tensor=2, data=1) and teacher.engine.recompute == "none"
    assert len(worlds_of(check.resolve(rehearsal(), LAPTOP))) == 1


@pytest.mark.parametrize(
    ("values", "path", "words"),
    [
        ({f"{DISTILLATION}top_k": 0}, "stages.distill.distillation.top_k", ["do not travel", "service=null"]),
        ({f"{DISTILLATION}logits": "/tmp/said"}, "stages.distill.distillation.service", ["not asked again"]),
        (
            {f"{DISTILLATION}hidden_states": HiddenStatesConfig(layers={0: 1}, distance="mse", weight=1.0)},
            "stages.distill.distillation.hidden_states",
            ["do not travel", "service=null"],
        ),
        ({"launcher": "ray_train"}, "launcher", ["stages.distill.distillation.service", "launcher=gang"]),
        (
            {"stages__recover__distillation__service": WIDE, "stages__recover__distillation__top_k": 16},
            "stages.distill.distillation.service",
            ["otherwise than stages.recover", "Make them equal"],
        ),
        (
            {f"{DISTILLATION}service__mesh": MeshConfig(tensor=3)},
            "stages.distill.distillation.service.mesh.tensor",
            ["3 tensor ranks", "Possible"],
        ),
        (
            {f"{DISTILLATION}service__mesh": MeshConfig(data=3)},
            "stages.distill.training.global_batch",
            ["3 data ranks", "Nearest", "on the mesh of stages.distill.distillation.service"],
        ),
        (
            {f"{DISTILLATION}service__sequence_parallel": True},
            "stages.distill.distillation.service.sequence_parallel",
            ["Set stages.distill.distillation.service.sequence_parallel=false"],
        ),
        (
            {"cluster__ranks_per_node": 2, "engine__mesh__data": 2},
            "engine.mesh",
            ["1 x 2 = 2 less 1 of the teacher = 1", "engine.mesh.data=1"],
        ),
        ({"cluster__ranks_per_node": 1, "engine__mesh__data": 1}, "engine.mesh", ["shrink an axis of the teacher"]),
        (
            {f"{DISTILLATION}service__mesh": MeshConfig(tensor=2, pipeline=4)},
            "engine.mesh",
            ["8 ranks of a teacher are 9 ranks; 2 CPU cores take at most 8"],
        ),
    ],
)
def test_what_cannot_be_is_refused_before_launch(values, path, words):
    assert_told(served(**values), path, *words)


def test_a_teacher_that_does_not_fit_its_gpus_is_refused_by_part():
    path = "stages.distill.distillation.service.mesh"
    for mesh, fits in ((MeshConfig(tensor=1), False), (MeshConfig(tensor=8), True)):
        found = problems_of(full_size(**{f"{DISTILLATION}service": ServiceConfig(mesh=mesh)}))
        assert (path not in found) == fits
    found = problems_of(full_size(**{f"{DISTILLATION}service": SERVICE}))[path]
    assert "tensor 1" in found and "a GPU for the teacher" in found and "weights 1" in found
    few = replace(FOUR_GPUS, gpus=("H100",))
    assert_told(served(), "engine.mesh", "1 ranks of a teacher are 2 ranks, and there are 1 GPUs", machine=few)


def test_students_have_the_memory_of_their_teacher_and_wait_for_it_only_where_it_is_slower():
    gpu = gpu_named("H200")
    inside = check.resolve(full_size(), LAPTOP)
    alone = fit.step_of_stage(changed(inside, **{f"{DISTILLATION}logits": "x"}), "distill", gpu)
    few, many = (
        changed(inside, **{f"{DISTILLATION}service": ServiceConfig(mesh=MeshConfig(tensor=8, data=data))})
        for data in (1, 128)
    )
    assert fit.memory_of_stage(few, "distill").teacher == 0 < fit.memory_of_stage(inside, "distill").teacher
    assert fit.step_of_stage(many, "distill", gpu) == alone, "the teacher is done before the student"
    slow = fit.serving_of_stage(few, "distill")
    assert slow.layout.num_gpus == 8
    waiting = fit.step_of_stage(few, "distill", gpu)
    assert (
        waiting.seconds == pytest.approx(fit.served_seconds(few, "distill", gpu))
        and waiting.seconds > 10 * alone.seconds
    )
    assert slow.worst.needed < gpu.memory_bytes
    made = stage_plan(few, "distill", few.cluster.hardware, gpu)
    assert made.num_gpus == made.layout.num_gpus + 8 and made.step == waiting
    assert "waiting for the teacher" in waiting_of(made) and "on 8 GPUs of its own" in model_of(made)


def test_a_job_has_the_ranks_of_a_teacher_only_for_its_own_stages():
    config = changed(
        composed("business_module", "cluster=h200_slurm", "cluster.slurm.stage_nodes={distill: 36}"),
        **{f"{DISTILLATION}service": ServiceConfig(mesh=MeshConfig(tensor=8, data=4))},
    )
    config = check.resolve(config, LAPTOP)
    assert chain.num_teacher_ranks(config) == 0
    there = chain.for_stage(config, "distill")
    assert chain.num_teacher_ranks(there) == 32
    assert check.mesh_of(there).world_size == 36 * 8 - 32 == check.mesh_of(config).world_size


def test_where_a_teacher_is_may_change_when_a_run_goes_on_and_rounding_may_not():
    exact = replace(SERVICE, sent_as="fp32")
    assert computed(served(exact)) == computed(served(None)) == computed(served(replace(WIDE, sent_as="fp32")))
    assert computed(served(SERVICE)) == computed(served(WIDE)) != computed(served(exact))
