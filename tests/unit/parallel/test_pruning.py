"""Which parts stay, and that any box of the pruned model is the parent's parts."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from conf.errors import CheckpointError
from conf.schema import ModelConfig
from parallel.importance import Importance
from parallel.initial import InitialWeights
from parallel.pruning import PrunedWeights, most_important, retained
from parallel.weight_importance import random_importance
from parallel.weight_names import logical_shapes

PARENT = ModelConfig(
    name="parent",
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=40,
    num_attention_heads=8,
    num_kv_heads=4,
    head_dim=4,
    vocab_size=48,
    max_sequence_length=16,
    rope_theta=1e4,
    norm_epsilon=1e-5,
    init_std=0.1,
    tied_embeddings=False,
)
SHAPE = replace(PARENT, num_layers=2, hidden_size=24, ffn_hidden_size=20, num_attention_heads=4, num_kv_heads=2)


@pytest.fixture
def importance():
    return random_importance(PARENT, seed=5)


def test_as_many_parts_stay_as_the_shape_has_and_they_are_the_largest(importance):
    kept = most_important(importance, PARENT, SHAPE)
    assert len(kept.layers) == 2 and len(kept.hidden) == 24 and {len(each) for each in kept.ffn} == {20}
    assert all(np.all(np.diff(each) > 0) for each in (kept.layers, kept.hidden, *kept.ffn, *kept.groups, *kept.heads))
    for layer, ffn in zip(kept.layers, kept.ffn, strict=True):
        gone = np.setdiff1d(np.arange(PARENT.ffn_hidden_size), ffn)
        assert importance.ffn_LF[layer][ffn].min() >= importance.ffn_LF[layer][gone].max()


def test_the_first_layer_stays_however_little_it_matters(importance):
    importance.layers_L[0] = 0.0
    assert most_important(importance, PARENT, SHAPE).layers[0] == 0


def test_heads_stay_with_their_key_value_group(importance):
    kept = most_important(importance, PARENT, SHAPE)
    per_group = PARENT.num_attention_heads // PARENT.num_kv_heads
    for groups, heads in zip(kept.groups, kept.heads, strict=True):
        assert (heads // per_group).tolist() == np.repeat(groups, 2).tolist()


def test_what_is_retained_grows_with_the_shape(importance):
    shares = [retained(importance, most_important(importance, PARENT, shape)) for shape in (SHAPE, PARENT)]
    assert 0 < shares[0] < shares[1] == pytest.approx(1.0)


def test_any_box_is_the_parents_parts_and_the_whole_is_its_boxes(importance):
    source = InitialWeights(PARENT, 1)
    kept = most_important(importance, PARENT, SHAPE)
    pruned = PrunedWeights(source, PARENT, SHAPE, kept)
    for name, shape in logical_shapes(SHAPE).items():
        whole = pruned.read(name, (0,) * len(shape), shape)
        assert whole.shape == shape
        half = tuple(-(-size // 2) for size in shape)
        rest = tuple(size - start for size, start in zip(shape, half, strict=True))
        box = tuple(slice(start, None) for start in half)
        torch.testing.assert_close(pruned.read(name, half, rest), whole[box])
    parent_layer = int(kept.layers[1])
    up = source.read(f"model.layers.{parent_layer}.mlp.up_proj.weight", (0, 0), (PARENT.ffn_hidden_size, 32))
    torch.testing.assert_close(
        pruned.read("model.layers.1.mlp.up_proj.weight", (0, 0), (20, 24)), up[kept.ffn[1]][:, kept.hidden]
    )


def test_boxes_and_names_that_are_not_there_are_refused(importance):
    pruned = PrunedWeights(InitialWeights(PARENT, 1), PARENT, SHAPE, most_important(importance, PARENT, SHAPE))
    with pytest.raises(CheckpointError, match="no such weight"):
        pruned.read("model.layers.3.mlp.up_proj.weight", (0, 0), (1, 1))
    with pytest.raises(CheckpointError, match="outside"):
        pruned.read("model.norm.weight", (20,), (5,))


def test_scores_that_are_not_finite_are_named():
    importance = Importance.zeros(PARENT)
    importance.ffn_LF[2, 3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"ffn is not finite in layers \[2\]"):
        importance.require_finite()
