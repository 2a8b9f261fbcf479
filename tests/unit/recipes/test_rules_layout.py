"""Rules between the model, the batch and the axes: what each refuses, and in which words."""

import pytest
from check_samples import LAPTOP, assert_told, changed, full_size, layout, rehearsal

from recipes import check


def test_axes_multiply_to_the_ranks():
    config = layout(full_size(), tensor=8, data=16)
    assert_told(config, "engine.mesh", "is 128 ranks", "32 x 8 = 256", "engine.mesh.data=32")


def test_axes_that_cannot_multiply_to_the_ranks():
    assert_told(layout(full_size(), tensor=4, pipeline=5), "engine.mesh", "is 20 and must divide 256")


def test_tensor_ranks_stay_within_a_node():
    config = layout(full_size(cluster__ranks_per_node=4, cluster__num_nodes=64), tensor=8)
    assert_told(config, "engine.mesh.tensor", "must not cross nodes", "Possible: 1, 2, 4")


def test_heads_divide():
    config = layout(rehearsal(), tensor=4)
    assert_told(config, "engine.mesh.tensor", "num_kv_heads=2", "Possible for this model: 1, 2.")


def test_vocabulary_divides():
    config = layout(rehearsal(model__vocab_size=4097), tensor=2)
    assert_told(config, "model.vocab_size", "multiple of 2", "Nearest above: 4098")


def test_layers_divide():
    config = layout(rehearsal(), pipeline=2, virtual_pipeline=3)
    assert_told(config, "engine.mesh.pipeline", "num_layers=4", "2 x virtual_pipeline 3 = 6", "1, 2, 4")


def test_interleaving_needs_a_pipeline():
    assert_told(layout(rehearsal(), virtual_pipeline=2), "engine.mesh.virtual_pipeline", "virtual_pipeline=1")


def test_interleaving_takes_whole_rounds():
    config = layout(rehearsal(stages__specialise__training__global_batch=12), pipeline=2, virtual_pipeline=2)
    words = ("3 micro-batches", "rounds of 2", "Nearest: 8 or 16")
    assert_told(config, "stages.specialise.training.global_batch", *words)


def test_batch_divides():
    config = layout(rehearsal(stages__specialise__training__global_batch=100), data=3)
    words = ("100 sequences", "3 data ranks", "micro-batches of 4", "multiple of 12", "Nearest: 96 or 108")
    assert_told(config, "stages.specialise.training.global_batch", *words)


def test_query_heads_share_key_value_heads():
    assert_told(rehearsal(model__num_kv_heads=3), "model.num_kv_heads", "4 attention heads", "Possible: 1, 2, 4")


def test_rotary_positions_need_pairs():
    assert_told(rehearsal(model__head_dim=33), "model.head_dim", "must be even", "32 or 34")


def test_sequence_parallel_needs_tensor_ranks():
    assert_told(rehearsal(engine__sequence_parallel=True), "engine.sequence_parallel", "sequence_parallel=false")


@pytest.mark.parametrize("path", ["stages.specialise.training.sequence_length", "stages.evaluate.sequence_length"])
def test_sequence_is_within_the_positions(path):
    config = rehearsal(**{path.replace(".", "__"): 512})
    assert_told(config, path, "is 512", "max_sequence_length=128")


def test_sequence_splits_over_context_ranks():
    config = layout(rehearsal(stages__specialise__training__sequence_length=122), context=2)
    words = ("2 context ranks", "multiple of 4", "120 or 124")
    assert_told(config, "stages.specialise.training.sequence_length", *words)


def test_sequence_splits_over_sequence_parallel_ranks():
    config = layout(rehearsal(stages__specialise__training__sequence_length=251), tensor=2)
    config = changed(config, engine__sequence_parallel=True)
    words = ("split over 2 sequence-parallel tensor ranks", "Nearest: 250 or 252")
    assert_told(config, "stages.specialise.training.sequence_length", *words)


def test_a_pipeline_that_mostly_waits_is_warned_of():
    config = layout(rehearsal(order=("specialise", "evaluate")), pipeline=4, data=2)
    (warning,) = (each for each in check.warnings(config, LAPTOP) if each.path.startswith("stages"))
    # One micro-batch passes four ranks in turn: each works a quarter of the time.
    assert "1 micro-batches" in warning.message and "75 %" in warning.message
