"""Shapes hold their target, fit the mesh, and are what Hugging Face's Llama takes."""

import time
from dataclasses import replace

import pytest

from conf.schema import ExpertsConfig, ModelConfig
from parallel.shapes import Grid, is_exportable, shapes_that_hold, size_of, smaller_shapes, student_shape

LARGE = ModelConfig(
    name="70b",
    num_layers=80,
    hidden_size=8192,
    ffn_hidden_size=28672,
    num_attention_heads=64,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_sequence_length=8192,
    rope_theta=5e5,
    norm_epsilon=1e-5,
    init_std=0.02,
    tied_embeddings=False,
)
MIXTURE = replace(
    LARGE,
    num_layers=20,
    experts=ExpertsConfig(
        num_experts=8, num_experts_per_token=2, balance_loss=0.0, router_z_loss=0.0, capacity_factor=None
    ),
)
GRID = Grid(hidden_multiple=256, ffn_multiple=1024, kv_heads_multiple=4, layers_multiple=20)


@pytest.mark.parametrize("measure", ["parameters", "memory"])
def test_targets_count_all_experts(measure):
    shapes = shapes_that_hold(MIXTURE, cut="width", measure=measure, removed=0.3, grid=GRID)
    assert len({shape.num_experts for shape in shapes}) > 1
    assert all(size_of(shape, measure) <= 0.7 * size_of(MIXTURE, measure) for shape in shapes)


@pytest.mark.parametrize("measure", ["parameters", "memory", "latency"])
@pytest.mark.parametrize("cut", ["width", "depth", "mixed"])
@pytest.mark.parametrize("removed", [0.2, 0.3])
def test_shapes_hold_the_target_and_fit_mesh_and_llama(cut, measure, removed):
    shapes = shapes_that_hold(LARGE, cut=cut, measure=measure, removed=removed, grid=GRID)
    assert shapes
    for shape in shapes:
        assert size_of(shape, measure) <= (1 - removed) * size_of(LARGE, measure)
        assert is_exportable(shape)
        assert shape.num_layers % 20 == 0 and shape.num_kv_heads % 4 == 0
        assert cut != "width" or shape.num_layers == 80
        assert cut != "depth" or replace(shape, num_layers=80) == LARGE


def test_experts_are_cut_too_as_far_as_ranks_and_tokens_let_them():
    def numbers(parent, experts_multiple, cut="width"):
        shapes = smaller_shapes(parent, cut, replace(GRID, experts_multiple=experts_multiple))
        return {shape.num_experts for shape in shapes}

    assert numbers(MIXTURE, 1) == {4, 5, 6, 7, 8}
    assert numbers(MIXTURE, 2) == {4, 6, 8} and numbers(MIXTURE, 8) == {8}
    assert numbers(replace(MIXTURE, experts=replace(MIXTURE.experts, num_experts_per_token=7)), 1) == {7, 8}
    assert numbers(replace(MIXTURE, num_layers=40), 1, cut="depth") == {8}
    assert numbers(LARGE, 2) == {1}


def test_no_shape_is_named_where_none_holds():
    assert shapes_that_hold(LARGE, cut="depth", measure="parameters", removed=0.9, grid=GRID) == []


@pytest.mark.parametrize("teacher", [LARGE, replace(MIXTURE, num_layers=80)], ids=["dense", "mixture"])
@pytest.mark.parametrize("ratio", [2, 5, 10, 20])
def test_student_has_its_share_of_the_teacher_and_keeps_its_proportions(teacher, ratio):
    student = student_shape(teacher, ratio, GRID)
    assert student.num_parameters * ratio == pytest.approx(teacher.num_parameters, rel=0.05)
    assert is_exportable(student) and student.num_layers < teacher.num_layers
    assert student.experts == teacher.experts
    assert student.num_attention_heads // student.num_kv_heads == 8


def test_looking_for_shapes_takes_no_time_on_the_finest_grid():
    started = time.process_time()
    grid = Grid(hidden_multiple=1, ffn_multiple=1, kv_heads_multiple=1, layers_multiple=1)
    student_shape(LARGE, 10, grid)
    assert shapes_that_hold(replace(LARGE, num_kv_heads=8), cut="width", measure="parameters", removed=0.3, grid=grid)
    assert time.process_time() - started < 10
