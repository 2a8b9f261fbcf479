"""The matrix product of a layer: weight gradients added in the product's own epilogue, and products in fp8.

Megatron's linear layers write a weight gradient, read it again and add it to the float32 gradient; with APEX they save
that pass, and here they save it without. `use_own_products` puts these products into the layers of a model.

Shape suffixes: M tokens (all leading dims flattened), K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Literal, cast

import torch
from megatron.core.tensor_parallel import layers, mappings
from torch import Tensor

Scaling = Literal["tensorwise", "rowwise"]
SCALING: dict[str, Scaling] = {"fp8": "tensorwise", "fp8_rowwise": "rowwise"}
LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)}
SMALLEST_AMAX = 1e-12


def use_own_products(chunks: Iterable[Any], scaling: Scaling | None) -> list[Tensor]:
    """Let the linear layers within the transformer layers add their weight gradients to `main_grad` themselves.

    Args:
        chunks: GPTModels whose parameters have, or will have, a `main_grad`. The output head is not touched.
        scaling: of fp8 products; None keeps the precision of the weights.

    Returns:
        The weights whose gradients come that way: Megatron must be told in every step (`grad_added_to_main_grad`).
    """
    weights = []
    for module in _linear_layers(chunks):
        if module.tp_group.size() == 1 or scaling is not None:
            module._forward_impl = partial(_forward, scaling)
            weights.append(module.weight)
        # Over tensor ranks Megatron's own overlaps the exchange with the product; it asks APEX for the epilogue.
        elif module.weight.dtype == torch.float32 or module.weight.is_cuda:
            layers.fused_weight_gradient_mlp_cuda = _Epilogue
            module.gradient_accumulation_fusion = True
    return weights


def _linear_layers(chunks: Iterable[Any]) -> Iterator[Any]:
    for chunk in chunks:
        for module in chunk.decoder.layers.modules():
            if isinstance(module, layers.ColumnParallelLinear | layers.RowParallelLinear):
                yield module


def accumulate_product(inputs_MK: Tensor, gradient_MN: Tensor, main_grad_NK: Tensor) -> None:
    """Add the weight gradient of a matrix product to the float32 `main_grad_NK`, in one pass where a GPU can."""
    if inputs_MK.dtype == main_grad_NK.dtype:
        main_grad_NK.addmm_(gradient_MN.t(), inputs_MK)
    elif inputs_MK.is_cuda:
        torch.addmm(main_grad_NK, gradient_MN.t(), inputs_MK, out_dtype=main_grad_NK.dtype, out=main_grad_NK)
    else:
        main_grad_NK.add_(gradient_MN.t() @ inputs_MK)


class _Epilogue:
    """What Megatron expects of APEX's extension."""

    wgrad_gemm_accum_fp32 = staticmethod(accumulate_product)


def _forward(  # noqa: PLR0913 (Megatron calls it with these)
    scaling: Scaling | None,
    input: Tensor,
    weight: Tensor,
    bias: None,
    *,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: Any,
    **_: object,
) -> Tensor:
    """Takes the place of Megatron's `linear_with_grad_accumulation_and_async_allreduce`."""
    assert bias is None
    if sequence_parallel:
        input = mappings.gather_from_sequence_parallel_region(input, group=tp_group)
    elif allreduce_dgrad:
        input = mappings.copy_to_tensor_model_parallel_region(input, group=tp_group)
    main_grad = weight.main_grad if weight.requires_grad else None  # type: ignore[attr-defined]
    return product(input, weight, main_grad) if scaling is None else fp8_product(input, weight, main_grad, scaling)


def product(inputs: Tensor, weight_NK: Tensor, main_grad_NK: Tensor | None) -> Tensor:
    """`inputs @ weight_NK.t()`; its weight gradient is added to `main_grad_NK`, and that of autograd is void."""
    return cast(Tensor, _Product.apply(inputs, weight_NK, main_grad_NK))  # type: ignore[no-untyped-call]


def fp8_product(inputs: Tensor, weight_NK: Tensor, main_grad_NK: Tensor | None, scaling: Scaling) -> Tensor:
    """`product` with all three products in fp8, scaled by the tensors themselves. All sizes are multiples of 16."""
    return cast(Tensor, _Fp8Product.apply(inputs, weight_NK, main_grad_NK, scaling))  # type: ignore[no-untyped-call]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight_NK: Tensor, main_grad_NK: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight_NK)
        ctx.main_grad = main_grad_NK  # not saved: it changes between forward and backward, and may
        return inputs @ weight_NK.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        inputs, weight_NK = ctx.saved_tensors
        _accumulate_product(inputs.flatten(0, -2), gradient.flatten(0, -2), ctx.main_grad)
        # Megatron's hooks want a gradient, and do not read it where `grad_added_to_main_grad` is set.
        return gradient @ weight_NK, torch.empty_like(weight_NK), None


class _Fp8Product(torch.autograd.Function):
    """Gradients are e5m2 where scales are tensorwise; all else is e4m3.

    Tensorwise keeps the input as fp8 for the backward pass. Rowwise scales run along the summed dim, which is another
    one in the backward pass, so it keeps the input as it came.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight_NK: Tensor, main_grad_NK: Tensor | None, scaling: Scaling) -> Tensor:
        dim = 1 if scaling == "rowwise" else None
        inputs_MK = inputs.flatten(0, -2)
        left_MK, left_scale = quantise(inputs_MK, dim)
        right_NK, right_scale = quantise(weight_NK, dim)
        output_MN = torch._scaled_mm(
            left_MK,
            right_NK.t(),
            left_scale,
            right_scale.view(1, -1) if dim else right_scale,
            out_dtype=inputs.dtype,
            use_fast_accum=True,
        )
        kept = (left_MK, left_scale) if dim is None else (inputs_MK, left_scale)
        ctx.save_for_backward(*kept, weight_NK)
        ctx.main_grad, ctx.scaling = main_grad_NK, scaling
        return _like(output_MN, inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        kept_MK, kept_scale, weight_NK = ctx.saved_tensors
        gradient_MN = gradient.flatten(0, -2)
        if ctx.scaling == "tensorwise":
            grad_MN, grad_scale = quantise(gradient_MN, None, torch.float8_e5m2)
            weight8_NK, weight_scale = quantise(weight_NK, None)
            for_inputs = (grad_MN, grad_scale, _column_major(weight8_NK), weight_scale)
            for_weight = (grad_MN.t().contiguous(), grad_scale, _column_major(kept_MK), kept_scale)
        else:
            grad_MN, grad_scale = quantise(gradient_MN, 1)
            weight8_NK, weight_scale = quantise(weight_NK, 0)
            for_inputs = (grad_MN, grad_scale, _column_major(weight8_NK), weight_scale)
            grad_MN, grad_scale = quantise(gradient_MN, 0)
            inputs_MK, inputs_scale = quantise(kept_MK, 0)
            for_weight = (grad_MN.t().contiguous(), grad_scale.view(-1, 1), _column_major(inputs_MK), inputs_scale)
        inputs_gradient_MK, weight_gradient_NK = (
            torch._scaled_mm(left, right, left_scale, right_scale, out_dtype=gradient.dtype)
            for left, left_scale, right, right_scale in (for_inputs, for_weight)
        )
        _accumulate(weight_gradient_NK, ctx.main_grad)
        return _like(inputs_gradient_MK, gradient), torch.empty_like(weight_NK), None, None


def quantise(tensor: Tensor, dim: int | None, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """The tensor in fp8, and the float32 scale to multiply it by: one, or (`dim`) one for each slice along `dim`."""
    amax = tensor.abs().amax() if dim is None else tensor.abs().amax(dim=dim, keepdim=True)
    scale = amax.float().clamp(min=SMALLEST_AMAX) / LARGEST[dtype]
    return (tensor.float() / scale).clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype), scale


def _like(matrix: Tensor, other: Tensor) -> Tensor:
    # As torch's own product does: Megatron copies what is a view of another tensor.
    return cast(Tensor, torch.ops.aten._unsafe_view(matrix, [*other.shape[:-1], matrix.size(-1)]))


def _column_major(matrix: Tensor) -> Tensor:
    # Hopper multiplies fp8 only where both factors run along the summed dim in memory.
    return matrix.t().contiguous().t()


@torch.library.custom_op("frontier::accumulate_product", mutates_args=("main_grad_NK",))
def _accumulate_product(inputs_MK: Tensor, gradient_MN: Tensor, main_grad_NK: Tensor) -> None:
    """One operation to the compiler, which would otherwise copy the float32 gradient to change it."""
    accumulate_product(inputs_MK, gradient_MN, main_grad_NK)


@torch.library.custom_op("frontier::accumulate", mutates_args=("main_grad_NK",))
def _accumulate(gradient_NK: Tensor, main_grad_NK: Tensor) -> None:
    main_grad_NK.add_(gradient_NK)


@_accumulate_product.register_fake
def _(inputs_MK: Tensor, gradient_MN: Tensor, main_grad_NK: Tensor) -> None:
    return None


@_accumulate.register_fake
def _(gradient_NK: Tensor, main_grad_NK: Tensor) -> None:
    return None
