from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_samples import MIXTURE, MODEL

from conf.errors import CheckpointError
from parallel.initial import InitialWeights
from parallel.weight_names import logical_shapes

WIDE = replace(MODEL, hidden_size=96, ffn_hidden_size=200, init_std=0.5)
SHAPES = logical_shapes(WIDE)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(sorted(SHAPES)), st.data())
def test_box_is_part_of_the_whole_whatever_its_place(name, data):
    shape = SHAPES[name]
    offset = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    box = tuple(data.draw(st.integers(1, size - start)) for size, start in zip(shape, offset, strict=True))
    whole = InitialWeights(WIDE, 3).read(name, (0,) * len(shape), shape)
    place = tuple(slice(start, start + size) for start, size in zip(offset, box, strict=True))
    assert torch.equal(InitialWeights(WIDE, 3).read(name, offset, box), whole[place])


def test_weights_have_the_asked_spread_and_residual_projections_less():
    weights = InitialWeights(WIDE, 3)
    for name in ("mlp.gate_proj.weight", "mlp.down_proj.weight"):
        full = f"model.layers.0.{name}"
        expected = 0.5 / (2 * WIDE.num_layers) ** 0.5 if "down" in name else 0.5
        assert weights.read(full, (0, 0), SHAPES[full]).std().item() == pytest.approx(expected, rel=0.03)
    assert weights.read("model.norm.weight", (4,), (3,)).tolist() == [1.0, 1.0, 1.0]


def test_experts_start_apart_and_their_way_back_is_narrowed():
    model = replace(MIXTURE, init_std=0.5)
    weights, layer = InitialWeights(model, 3), "model.layers.0.block_sparse_moe."
    down = [weights.read(f"{layer}experts.{expert}.w2.weight", (0, 0), (24, 40)) for expert in range(6)]
    assert torch.stack(down).std().item() == pytest.approx(0.5 / (2 * model.num_layers) ** 0.5, rel=0.03)
    assert all((one - other).abs().mean() > 0.1 for one, other in combinations(down, 2))
    assert weights.read(f"{layer}gate.weight", (0, 0), (6, 24)).std().item() == pytest.approx(0.5, rel=0.2)


def test_seed_name_and_row_block_each_change_the_weights():
    gate, up = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
    one = InitialWeights(WIDE, 3).read(gate, (0, 0), (64, 96))
    others = [
        InitialWeights(WIDE, 4).read(gate, (0, 0), (64, 96)),
        InitialWeights(WIDE, 3).read(up, (0, 0), (64, 96)),
        InitialWeights(WIDE, 3).read(gate, (64, 0), (64, 96)),
    ]
    assert all((one - other).abs().mean() > 0.3 for other in others)


@pytest.mark.parametrize(
    ("name", "offset", "shape"),
    [("model.nothing", (0,), (1,)), ("model.norm.weight", (95,), (2,)), ("model.norm.weight", (0, 0), (1, 1))],
)
def test_what_the_model_does_not_have_is_refused_by_name(name, offset, shape):
    with pytest.raises(CheckpointError, match=name):
        InitialWeights(WIDE, 3).read(name, offset, shape)
