"""Rounding to INT8 and FP8: errors are below half a step, scales are of rows, only layers' matrices are touched."""

import pytest
import torch

from parallel.quantisation import FP8, QuantisedWeights, is_quantised, quantised_rows, rounded
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


def test_int8_error_is_below_half_a_step_of_the_row(weight):
    values, scale = quantised_rows(weight, "w8a8")
    assert values.dtype == torch.int8 and values.abs().max() == 127
    # The largest of a row may be half a percent above the last step, for its scale is a bfloat16 number.
    assert ((values.float() * scale - weight).abs() <= scale * 0.5 + weight.abs() / 256).all()
    inner = values.abs() < 127
    assert ((values.float() * scale - weight).abs()[inner] <= (scale / 2 + 1e-7).expand_as(weight)[inner]).all()


def test_fp8_error_is_below_a_sixteenth_of_the_value(weight):
    values, scale = quantised_rows(weight, "fp8")
    assert values.dtype == FP8 and values.float().abs().max() == torch.finfo(FP8).max
    # Three bits behind the first; the smallest of all are multiples of 2 ** -9 of the scale.
    assert ((values.float() * scale - weight).abs() <= weight.abs() / 16 + scale * 2**-10).all()


@pytest.mark.parametrize("scheme", ["w8a8", "fp8"])
def test_rounding_again_changes_nothing_and_scales_are_had_again(weight, scheme):
    values, scale = quantised_rows(weight, scheme)
    again, same_scale = quantised_rows(values.float() * scale, scheme)
    assert torch.equal(again.float(), values.float()) and torch.equal(same_scale, scale)
    assert torch.equal(scale.bfloat16().float(), scale), "an export in bfloat16 has the same scales"


@pytest.mark.parametrize("scheme", ["w8a8", "fp8"])
def test_a_row_of_zeros_stays_one(scheme):
    values, scale = quantised_rows(torch.zeros(2, 4), scheme)
    assert not values.float().any() and scale.isfinite().all()


def test_part_of_a_row_is_rounded_as_the_row(weight):
    source = QuantisedWeights(Whole(weight), {NAME: (12, 20)}, "w8a8")
    whole = source.read(NAME, (0, 0), (12, 20))
    assert torch.equal(source.read(NAME, (3, 5), (4, 6)), whole[3:7, 5:11])
    assert not torch.equal(whole, weight)


def test_layers_matrices_are_rounded_and_nothing_else():
    assert is_quantised(NAME, ()) and is_quantised("model.layers.11.self_attn.o_proj.weight", ())
    assert is_quantised("model.layers.0.block_sparse_moe.experts.7.w2.weight", ())
    for name in (
        "model.layers.0.block_sparse_moe.gate.weight",
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.norm.weight",
    ):
        assert not is_quantised(name, ())
    assert not is_quantised(NAME, (0,)) and is_quantised(NAME, (1,))


@pytest.mark.parametrize(("scheme", "error"), [("w8a8", 1 / 127), ("fp8", 1 / 16)])
def test_inputs_are_rounded_token_by_token(scheme, error):
    values = torch.tensor([[1.0, -0.5, 0.25], [1000.0, 1.0, -1.0], [0.0, 0.0, 0.0]])
    found = rounded(values, scheme, None)
    assert found[0] == pytest.approx(values[0], abs=error), "a large token beside it costs it nothing"
    assert found[2].tolist() == [0.0, 0.0, 0.0]
    if scheme == "w8a8":
        assert found[1, 1] == 0.0, "a large channel takes the small ones' steps away"
    else:
        assert found[1, 1] == pytest.approx(1.0, rel=error), "floats keep small channels beside a large one"


def test_four_values_share_a_word():
    words = packed(torch.tensor([[-128, 0, 1, 127, 5]], dtype=torch.int8))
    assert words.dtype == torch.int32 and words.shape == (1, 2)
    assert words[0, 0].item() & 0xFF == 0 and (words[0, 0].item() >> 8) & 0xFF == 128 and words[0, 1].item() == 133
