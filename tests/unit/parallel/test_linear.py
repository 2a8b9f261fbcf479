"""Products that add weight gradients where they belong, and fp8 beside the exact product."""

from __future__ import annotations

import pytest
import torch

from parallel.linear import accumulate_product, fp8_product, product, quantise


def tensors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    inputs, weight, gradient = torch.randn(4, 8, 48), torch.randn(64, 48), torch.randn(4, 8, 64)
    main_grad = torch.randn(64, 48)
    return inputs.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), gradient.to(dtype), main_grad


def gradients(inputs, weight, gradient):
    """Of the exact product: of the inputs and of the weight."""
    double = [each.detach().double() for each in (inputs, weight, gradient)]
    return double[2] @ double[1], double[2].flatten(0, 1).t() @ double[0].flatten(0, 1)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_weight_gradient_is_added_to_main_grad_in_every_pass(is_compiled):
    inputs, weight, gradient, main_grad = tensors()
    before = main_grad.clone()
    multiply = torch.compile(product, fullgraph=True) if is_compiled else product
    for _ in range(2):
        multiply(inputs, weight, main_grad).backward(gradient)
    of_inputs, of_weight = gradients(inputs, weight, gradient)
    torch.testing.assert_close(inputs.grad.double(), 2 * of_inputs, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(main_grad.double(), before.double() + 2 * of_weight, atol=1e-4, rtol=1e-5)


def test_bf16_weight_gradients_are_added_in_float32():
    inputs, weight, gradient, main_grad = tensors(torch.bfloat16)
    before = main_grad.clone()
    accumulate_product(inputs.detach().flatten(0, 1), gradient.flatten(0, 1), main_grad)
    _, of_weight = gradients(inputs, weight, gradient)
    assert main_grad.dtype == torch.float32
    torch.testing.assert_close(main_grad.double(), before + of_weight, atol=0.1, rtol=0.01)


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
def test_fp8_products_are_near_the_exact_ones(scaling):
    inputs, weight, gradient, main_grad = tensors(torch.bfloat16)
    before = main_grad.double()
    output = fp8_product(inputs, weight, main_grad, scaling)
    output.backward(gradient)
    of_inputs, of_weight = gradients(inputs, weight, gradient)
    # e4m3 has 3 bits of mantissa and e5m2 2: errors of 3 and 6 % an element, less in a sum.
    assert relative_error(output, inputs.double() @ weight.double().t()) < 0.05
    assert relative_error(inputs.grad, of_inputs) < 0.1
    assert relative_error(main_grad.double() - before, of_weight) < 0.1
    assert output.dtype == inputs.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_scales_map_the_largest_value_to_the_largest_number(dim):
    matrix = torch.randn(16, 32) * torch.logspace(-3, 3, 32)
    quantised, scale = quantise(matrix, dim)
    largest = quantised.float().abs()
    expected = torch.finfo(torch.float8_e4m3fn).max
    assert (largest.max() if dim is None else largest.amax(dim)).eq(expected).all()
    assert (quantised.float() * scale - matrix).abs().max() <= matrix.abs().max() / 16


def test_rows_of_zeros_stay_zeros():
    quantised, scale = quantise(torch.zeros(4, 8), 1)
    assert (quantised.float() == 0).all()
    assert scale.isfinite().all()
