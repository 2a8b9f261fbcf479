"""Rounding to INT8: errors are below half a step, scales are of whole rows, and only layers' matrices are touched."""

import pytest
import torch

from parallel.quantisation import QuantisedWeights, is_quantised, quantised_rows, rounded
from recipes.compressed_tensors import packed

NAME = "model.layers.0.mlp.up_proj.weight"


class Whole:
    def __init__(self, tensor):
        self.tensor = tensor

    def read(self, name, offset, shape):
        return self.tensor[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]


@pytest.fixture
def weight():
    return torch.randn(12, 20, generator=torch.Generator().manual_seed(1))


def test_error_is_below_half_a_step_of_the_row(weight):
    values, scale = quantised_rows(weight)
    assert values.dtype == torch.int8 and values.abs().max() == 127
    assert ((values.float() * scale - weight).abs() <= scale / 2 + 1e-7).all()


def test_rounding_again_changes_nothing(weight):
    values, scale = quantised_rows(weight)
    again, _ = quantised_rows(values.float() * scale)
    assert torch.equal(again, values)


def test_a_row_of_zeros_stays_one():
    values, scale = quantised_rows(torch.zeros(2, 4))
    assert not values.any() and scale.isfinite().all()


def test_part_of_a_row_is_rounded_as_the_row(weight):
    source = QuantisedWeights(Whole(weight), {NAME: (12, 20)})
    whole = source.read(NAME, (0, 0), (12, 20))
    assert torch.equal(source.read(NAME, (3, 5), (4, 6)), whole[3:7, 5:11])
    assert not torch.equal(whole, weight)


def test_layers_matrices_are_rounded_and_nothing_else():
    assert is_quantised(NAME, ()) and is_quantised("model.layers.11.self_attn.o_proj.weight", ())
    for name in (
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.norm.weight",
    ):
        assert not is_quantised(name, ())
    assert not is_quantised(NAME, (0,)) and is_quantised(NAME, (1,))


def test_inputs_are_rounded_token_by_token():
    values = torch.tensor([[1.0, -0.5, 0.25], [1000.0, 1.0, -1.0], [0.0, 0.0, 0.0]])
    found = rounded(values, None)
    assert found[0] == pytest.approx(values[0], abs=1 / 127), "a large token beside it costs it nothing"
    assert found[1, 1] == 0.0 and found[2].tolist() == [0.0, 0.0, 0.0]


def test_four_values_share_a_word():
    words = packed(torch.tensor([[-128, 0, 1, 127, 5]], dtype=torch.int8))
    assert words.dtype == torch.int32 and words.shape == (1, 2)
    assert words[0, 0].item() & 0xFF == 0 and (words[0, 0].item() >> 8) & 0xFF == 128 and words[0, 1].item() == 133
