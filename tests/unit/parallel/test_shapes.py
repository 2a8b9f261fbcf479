"""Shapes hold their target, fit the mesh, and are what Hugging Face's Llama takes."""

import time
from dataclasses import replace

import pytest

from conf.schema import ModelConfig
from parallel.shapes import Grid, is_exportable, shapes_that_hold, size_of, student_shape

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
GRID = Grid(hidden_multiple=256, ffn_multiple=1024, kv_heads_multiple=4, layers_multiple=20)


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


def test_no_shape_is_named_where_none_holds():
    assert shapes_that_hold(LARGE, cut="depth", measure="parameters", removed=0.9, grid=GRID) == []


@pytest.mark.parametrize("ratio", [2, 5, 10, 20])
def test_student_has_its_share_of_the_teacher_and_keeps_its_proportions(ratio):
    student = student_shape(LARGE, ratio, GRID)
    assert student.num_parameters * ratio == pytest.approx(LARGE.num_parameters, rel=0.05)
    assert is_exportable(student) and student.num_layers < LARGE.num_layers
    assert student.num_attention_heads // student.num_kv_heads == 8


def test_looking_for_shapes_takes_no_time_on_the_finest_grid():
    started = time.process_time()
    grid = Grid(hidden_multiple=1, ffn_multiple=1, kv_heads_multiple=1, layers_multiple=1)
    student_shape(LARGE, 10, grid)
    assert shapes_that_hold(replace(LARGE, num_kv_heads=8), cut="width", measure="parameters", removed=0.3, grid=grid)
    assert time.process_time() - started < 10
