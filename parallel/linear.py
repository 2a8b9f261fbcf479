"""The matrix product of a layer: weight gradients added in the product's own epilogue, products in fp8 and by oneDNN.

Megatron's linear layers write a weight gradient, read it again and add it to the float32 gradient; with APEX they save
that pass, and here they save it without. `use_own_products` puts these products into the layers of a model.

Shape suffixes: M tokens (all leading dims flattened), K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from megatron.core.tensor_parallel import layers, mappings
from torch import Tensor

Scaling = Literal["tensorwise", "rowwise"]
Exchange = Literal["none", "gather", "sum"]
SCALING: dict[str, Scaling] = {"fp8": "tensorwise", "fp8_rowwise": "rowwise"}
LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)}
SMALLEST_AMAX = 1e-12
HAS_ONEDNN = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


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
        module._forward_impl = partial(_forward, scaling)
        weights.append(module.weight)
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


def matrix_product(inputs: Tensor, weight: Tensor, *, transposed: bool) -> Tensor:
    """`inputs @ weight.t()` where transposed, else `inputs @ weight`; float32 on a CPU by oneDNN, not MKL."""
    if inputs.is_cpu and inputs.dtype == torch.float32 and HAS_ONEDNN:
        return cast(Tensor, _onednn_product(inputs, weight, transposed))
    return inputs @ (weight.t() if transposed else weight)


def _multiply_by_onednn(inputs: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    rows = weight if transposed else weight.t()
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(inputs, rows, None, "none", [], None))


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
    main_grad = weight.main_grad if weight.requires_grad else None  # type: ignore[attr-defined]
    exchange: Exchange = "gather" if sequence_parallel else "sum" if allreduce_dgrad else "none"
    if scaling is None:
        return product(input, weight, main_grad, exchange, tp_group)
    if exchange == "gather":
        input = mappings.gather_from_sequence_parallel_region(input, group=tp_group)
    elif exchange == "sum":
        input = mappings.copy_to_tensor_model_parallel_region(input, group=tp_group)
    return fp8_product(input, weight, main_grad, scaling)


def product(
    inputs: Tensor,
    weight_NK: Tensor,
    main_grad_NK: Tensor | None,
    exchange: Exchange = "none",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`inputs @ weight_NK.t()`; its weight gradient is added to `main_grad_NK`, and that of autograd is void.

    Args:
        inputs: (..., K); where they are gathered, this rank's part of the first dim.
        weight_NK: this rank's columns.
        main_grad_NK: float32; None where the weight is not trained.
        exchange: with the other ranks of `group`, which hold other columns: "gather" the inputs along the first dim and
            scatter their gradient, "sum" the gradient of inputs that all have, or "none".
        group: tensor ranks.
    """
    output = _Product.apply(inputs, weight_NK, main_grad_NK, exchange, group)  # type: ignore[no-untyped-call]
    return cast(Tensor, output)


def fp8_product(inputs: Tensor, weight_NK: Tensor, main_grad_NK: Tensor | None, scaling: Scaling) -> Tensor:
    """`product` with all three products in fp8, scaled by the tensors themselves. All sizes are multiples of 16."""
    return cast(Tensor, _Fp8Product.apply(inputs, weight_NK, main_grad_NK, scaling))  # type: ignore[no-untyped-call]


class _Product(torch.autograd.Function):
    """Exchanges go on beside the products that do not wait for them, and compiled layers keep them in their graph.

    Gathered inputs are not kept but gathered again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight_NK: Tensor,
        main_grad_NK: Tensor | None,
        exchange: Exchange,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight_NK)
        ctx.main_grad = main_grad_NK  # not saved: it changes between forward and backward, and may
        ctx.exchange, ctx.group = exchange, group
        return matrix_product(_arrived(_gathered(inputs, exchange, group)), weight_NK, transposed=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (gradient,) = gradients
        inputs, weight_NK = ctx.saved_tensors
        inputs = _gathered(inputs, ctx.exchange, ctx.group)
        inputs_gradient = matrix_product(gradient, weight_NK, transposed=False)
        if ctx.exchange == "gather":
            inputs_gradient = collectives.reduce_scatter_tensor(inputs_gradient, "sum", 0, ctx.group)
        elif ctx.exchange == "sum":
            inputs_gradient = collectives.all_reduce(inputs_gradient, "sum", ctx.group)
        _accumulate_product(_arrived(inputs).flatten(0, -2), gradient.flatten(0, -2), ctx.main_grad)
        # Megatron's hooks want a gradient, and do not read it where `grad_added_to_main_grad` is set.
        return _arrived(inputs_gradient), torch.empty_like(weight_NK), None, None, None


def _gathered(inputs: Tensor, exchange: Exchange, group: Any) -> Tensor:
    return collectives.all_gather_tensor(inputs, 0, group) if exchange == "gather" else inputs


def _arrived(tensor: Tensor) -> Tensor:
    """What is under way outside of compiled graphs, waited for by the device."""
    if isinstance(tensor, collectives.AsyncCollectiveTensor):
        return cast(Tensor, tensor.trigger_wait())  # type: ignore[no-untyped-call]
    return tensor


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
        _accumulate(ctx.main_grad, weight_gradient_NK)
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


def _add_to(main_grad_NK: Tensor, gradient_NK: Tensor) -> None:
    main_grad_NK.add_(gradient_NK)


def _operation(
    name: str, schema: str, function: Callable[..., Tensor | None], shape: Callable[..., Tensor | None]
) -> Callable[..., Tensor | None]:
    """A function as one operation to the compiler.

    The compiler would otherwise copy a float32 gradient to change it, and a transposed weight to multiply by it.
    Not `torch.library.custom_op`: what it does around every call takes longer than adding up a small gradient.
    """
    LIBRARY.define(f"{name}{schema}")  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"frontier::{name}", shape, lib=LIBRARY)
    return cast("Callable[..., Tensor | None]", getattr(torch.ops.frontier, name).default)


def _nothing(*_: Tensor) -> None:
    return None


def _shape_of_product(inputs: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    return inputs.new_empty((*inputs.shape[:-1], weight.size(0 if transposed else 1)))


LIBRARY = torch.library.Library("frontier", "DEF")  # type: ignore[no-untyped-call]
_accumulate_product = _operation(
    "accumulate_product", "(Tensor inputs, Tensor gradient, Tensor(a!) main_grad) -> ()", accumulate_product, _nothing
)
_accumulate = _operation("accumulate", "(Tensor(a!) main_grad, Tensor gradient) -> ()", _add_to, _nothing)
_onednn_product = _operation(
    "onednn_product",
    "(Tensor inputs, Tensor weight, bool transposed) -> Tensor",
    _multiply_by_onednn,
    _shape_of_product,
)
