"""Which parts stay, and that any box of the pruned model is the parent's parts."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from conf.errors import CheckpointError
from conf.schema import ExpertsConfig, ModelConfig
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


EXPERTS = ExpertsConfig(
    num_experts=6, num_experts_per_token=2, balance_loss=0.0, router_z_loss=0.0, capacity_factor=None
)


@pytest.fixture
def importance():
    return random_importance(PARENT, seed=5)


@pytest.fixture(params=["dense", "mixture"])
def family(request):
    """A parent and a smaller shape of it."""
    if request.param == "dense":
        return PARENT, SHAPE
    return replace(PARENT, experts=EXPERTS), replace(SHAPE, experts=EXPERTS).with_experts(4)


def test_as_many_parts_stay_as_the_shape_has_and_they_are_the_largest(importance):
    kept = most_important(importance, PARENT, SHAPE)
    assert len(kept.layers) == 2 and len(kept.hidden) == 24 and {len(ffn) for (ffn,) in kept.ffn} == {20}
    ascending = (kept.layers, kept.hidden, *(ffn for (ffn,) in kept.ffn), *kept.groups, *kept.heads)
    assert all(np.all(np.diff(each) > 0) for each in ascending)
    for layer, (ffn,) in zip(kept.layers, kept.ffn, strict=True):
        gone = np.setdiff1d(np.arange(PARENT.ffn_hidden_size), ffn)
        assert importance.ffn_LEF[layer, 0][ffn].min() >= importance.ffn_LEF[layer, 0][gone].max()


def test_each_layer_keeps_experts_and_each_of_those_neurons_of_its_own():
    parent, shape = replace(PARENT, experts=EXPERTS), replace(PARENT, experts=EXPERTS, ffn_hidden_size=20)
    importance = random_importance(parent, seed=5)
    kept = most_important(importance, parent, shape.with_experts(4))
    assert len({tuple(experts) for experts in kept.experts}) > 1
    for layer, (experts, ffn) in enumerate(zip(kept.experts, kept.ffn, strict=True)):
        gone = np.setdiff1d(np.arange(6), experts)
        assert importance.experts_LE[layer][experts].min() >= importance.experts_LE[layer][gone].max()
        for expert, neurons in zip(experts, ffn, strict=True):
            expected = importance.ffn_LEF[layer, expert].argsort(descending=True)[:20].sort().values
            assert neurons.tolist() == expected.tolist()


def test_the_first_layer_stays_however_little_it_matters(importance):
    importance.layers_L[0] = 0.0
    assert most_important(importance, PARENT, SHAPE).layers[0] == 0


def test_heads_stay_with_their_key_value_group(importance):
    kept = most_important(importance, PARENT, SHAPE)
    per_group = PARENT.num_attention_heads // PARENT.num_kv_heads
    for groups, heads in zip(kept.groups, kept.heads, strict=True):
        assert (heads // per_group).tolist() == np.repeat(groups, 2).tolist()


def test_what_is_retained_grows_with_the_shape(family):
    parent, shape = family
    importance = random_importance(parent, seed=5)
    shares = [retained(importance, most_important(importance, parent, each)) for each in (shape, parent)]
    assert 0 < shares[0] < shares[1] == pytest.approx(1.0)


def test_any_box_is_the_parents_parts_and_the_whole_is_its_boxes(family):
    parent, smaller = family
    source = InitialWeights(parent, 1)
    kept = most_important(random_importance(parent, seed=5), parent, smaller)
    pruned = PrunedWeights(source, parent, smaller, kept)
    for name, shape in logical_shapes(smaller).items():
        whole = pruned.read(name, (0,) * len(shape), shape)
        assert whole.shape == shape
        half = tuple(-(-size // 2) for size in shape)
        rest = tuple(size - start for size, start in zip(shape, half, strict=True))
        box = tuple(slice(start, None) for start in half)
        torch.testing.assert_close(pruned.read(name, half, rest), whole[box])
    layer, its_layer = "model.layers.1.", f"model.layers.{kept.layers[1]}."
    if smaller.experts is None:
        ours = theirs = "mlp.up_proj.weight"
    else:
        ours, theirs = (f"block_sparse_moe.experts.{number}.w3.weight" for number in (2, kept.experts[1][2]))
        router = source.read(f"{its_layer}block_sparse_moe.gate.weight", (0, 0), (6, 32))
        expected = router[kept.experts[1]][:, kept.hidden]
        torch.testing.assert_close(pruned.read(f"{layer}block_sparse_moe.gate.weight", (0, 0), (4, 24)), expected)
    up = source.read(its_layer + theirs, (0, 0), (parent.ffn_hidden_size, 32))
    expected = up[kept.ffn[1][-1 if smaller.experts is None else 2]][:, kept.hidden]
    torch.testing.assert_close(pruned.read(layer + ours, (0, 0), (20, 24)), expected)


def test_boxes_and_names_that_are_not_there_are_refused(importance):
    pruned = PrunedWeights(InitialWeights(PARENT, 1), PARENT, SHAPE, most_important(importance, PARENT, SHAPE))
    with pytest.raises(CheckpointError, match="no such weight"):
        pruned.read("model.layers.3.mlp.up_proj.weight", (0, 0), (1, 1))
    with pytest.raises(CheckpointError, match="outside"):
        pruned.read("model.norm.weight", (20,), (5,))


def test_scores_that_are_not_finite_are_named():
    importance = Importance.zeros(PARENT)
    importance.ffn_LEF[2, 0, 3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"ffn is not finite in layers \[2\]"):
        importance.require_finite()
