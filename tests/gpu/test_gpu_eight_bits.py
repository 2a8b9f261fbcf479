"""Kernels of eight bits say what our rounding in floating point says, on a CPU too; the rest needs a GPU."""

from __future__ import annotations

import pytest
import torch

from bench.eight_bits import PRODUCTS, calls_of, layer_in, milliseconds
from parallel.quantisation import quantised_rows, rounded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("form", "scheme"), [("int8", "w8a8"), ("fp8", "fp8")])
@pytest.mark.parametrize("rows", [1, 16, 200])
def test_a_product_of_eight_bits_is_that_of_the_rounded_numbers(form, scheme, rows):
    random = torch.Generator(DEVICE).manual_seed(1)
    inputs = torch.randn(rows, 512, generator=random, device=DEVICE).bfloat16()
    weight = torch.randn(256, 512, generator=random, device=DEVICE).bfloat16()
    values, scale = quantised_rows(weight, scheme)
    expected = rounded(inputs.float(), scheme, None) @ (values.float() * scale).t()
    found = PRODUCTS[form](weight)(inputs)
    # Sums of fp8 products are kept with fewer digits by the fast kernel; then both are rounded to bf16.
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=0.3 if form == "fp8" else 0.1)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize(("rows", "length", "cached"), [(1, 128, 0), (2, 1, 64)])
def test_a_layer_in_eight_bits_says_nearly_what_it_says_in_bf16_and_is_timed(rows, length, cached):
    with torch.inference_mode():
        layers = {form: layer_in(form) for form in PRODUCTS}
        calls = calls_of(layers, rows, length, cached)
        exact = calls["bf16"]().float()
        for form in ("int8", "fp8"):
            error = (calls[form]().float() - exact).norm() / exact.norm()
            assert error < 0.05, form
        assert all(low <= median <= high for low, median, high in milliseconds(calls).values())
