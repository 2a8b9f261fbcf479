"""Prefill and decode of a layer of an 8B model in BF16, INT8 and FP8, with real kernels: `python -m bench.eight_bits`.

The layer is that of Llama 3 8B: norms, attention over a cache, SwiGLU, all compiled; its four matrices are products in
BF16, or of values of eight bits with a scale a row and a scale a token, which is found as the token comes. Those are
the schemes `w8a8` and `fp8` as they are exported. Layers take turns, so what else the machine does meets all alike.
Without a GPU nothing is measured.

Shape suffixes: M tokens, K inputs, N outputs, B rows, S tokens of a row, H heads, C channels of a head.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import quantiles

import torch
from torch import Tensor

from parallel.quantisation import FP8, FP8_LARGEST, INPUT_STEPS, quantised_rows

HIDDEN, FFN, HEADS, KV_HEADS, HEAD = 4096, 14336, 32, 8, 128
SHAPES = {
    "qkv": ((HEADS + 2 * KV_HEADS) * HEAD, HIDDEN),
    "out": (HIDDEN, HEADS * HEAD),
    "gate_up": (2 * FFN, HIDDEN),
    "down": (HIDDEN, FFN),
}
# INT8 kernels take more than 16 rows, and multiples of 8.
FEWEST_ROWS = 32
ROUNDS = 20
CACHED = 2048
PREFILLS = (512, 2048, 8192)
DECODES = (1, 16, 64)

Product = Callable[[Tensor], Tensor]


def bf16_product(weight_NK: Tensor) -> Product:
    """Inputs (M, K) to outputs (M, N)."""
    weight_KN = _in_place(weight_NK.t())
    return lambda inputs_MK: inputs_MK @ weight_KN


def int8_product(weight_NK: Tensor) -> Product:
    """The same, of INT8 values with scales."""
    values_NK, scale_N1 = map(_in_place, quantised_rows(weight_NK, "w8a8"))

    def product(inputs_MK: Tensor) -> Tensor:
        largest_M1 = inputs_MK.abs().amax(dim=1, keepdim=True).float()
        scale_M1 = largest_M1.clamp_min(torch.finfo(torch.float32).tiny) / INPUT_STEPS
        rounded_MK = (inputs_MK.float() / scale_M1).round().clamp(-128, 127).to(torch.int8)
        missing = max(0, FEWEST_ROWS - len(inputs_MK))
        sums_MN = torch._int_mm(torch.nn.functional.pad(rounded_MK, (0, 0, 0, missing)), values_NK.t())
        return (sums_MN[: len(inputs_MK)].float() * scale_M1 * scale_N1.t()).to(inputs_MK.dtype)

    return product


def fp8_product(weight_NK: Tensor) -> Product:
    """The same, of E4M3 values with scales."""
    values_NK, scale_N1 = map(_in_place, quantised_rows(weight_NK, "fp8"))

    def product(inputs_MK: Tensor) -> Tensor:
        largest_M1 = inputs_MK.abs().amax(dim=1, keepdim=True).float()
        scale_M1 = largest_M1.clamp_min(torch.finfo(torch.float32).tiny) / FP8_LARGEST
        rounded_MK = (inputs_MK.float() / scale_M1).clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8)
        return torch._scaled_mm(
            rounded_MK,
            values_NK.t(),
            scale_a=scale_M1,
            scale_b=scale_N1.t().contiguous(),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    return product


def _in_place(tensor: Tensor) -> Tensor:
    """A tensor that a graph of kernels reads where it is; else it would copy it in every call, as long as the layer."""
    torch._dynamo.mark_static_address(tensor)
    return tensor


PRODUCTS = {"bf16": bf16_product, "int8": int8_product, "fp8": fp8_product}


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer; `forward` takes hidden states of new tokens and a cache of keys and values with room for them."""

    products: dict[str, Product]

    def forward(self, hidden_BSD: Tensor, keys_BHSC: Tensor | None, values_BHSC: Tensor | None) -> Tensor:
        """The hidden states after it."""
        rows, length, _ = hidden_BSD.shape
        qkv_MN = self.products["qkv"](_norm(hidden_BSD).flatten(0, 1))
        heads_BHSC = qkv_MN.view(rows, length, HEADS + 2 * KV_HEADS, HEAD).transpose(1, 2)
        query, key, value = heads_BHSC.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        if keys_BHSC is not None and values_BHSC is not None:
            keys_BHSC[:, :, -length:], values_BHSC[:, :, -length:] = key, value
            key, value = keys_BHSC, values_BHSC
        mixed_BHSC = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=keys_BHSC is None, enable_gqa=True
        )
        hidden_BSD = hidden_BSD + self.products["out"](mixed_BHSC.transpose(1, 2).reshape(-1, HIDDEN)).view_as(
            hidden_BSD
        )
        gate_MF, up_MF = self.products["gate_up"](_norm(hidden_BSD).flatten(0, 1)).chunk(2, dim=1)
        down_MD = self.products["down"](torch.nn.functional.silu(gate_MF) * up_MF)
        return hidden_BSD + down_MD.view_as(hidden_BSD)


def _norm(hidden_BSD: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(hidden_BSD, (HIDDEN,))


def layer_in(form: str, device: str = "cuda") -> Layer:
    """A layer with random weights, the same in every form."""
    random = torch.Generator(device).manual_seed(1)
    products = {}
    for name, (outputs, inputs) in SHAPES.items():
        weight_NK = torch.randn(outputs, inputs, generator=random, device=device) / inputs**0.5
        products[name] = PRODUCTS[form](weight_NK.bfloat16())
    return Layer(products)


def milliseconds(calls: dict[str, Callable[[], object]]) -> dict[str, tuple[float, float, float]]:
    """Quartiles of each call's time over rounds, in which they take turns."""
    for call in calls.values():
        for _ in range(3):
            call()
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            spent[name].append(start.elapsed_time(end))
    return {name: tuple(quantiles(values, n=4, method="inclusive")) for name, values in spent.items()}  # type: ignore[misc]


def calls_of(layers: dict[str, Layer], rows: int, length: int, cached: int) -> dict[str, Callable[[], object]]:
    """A compiled forward pass of each layer on the same inputs."""
    hidden_BSD = _in_place(torch.randn(rows, length, HIDDEN, device="cuda", dtype=torch.bfloat16))
    cache: list[Tensor | None] = [None, None]
    if cached:
        shape = (rows, KV_HEADS, cached + length, HEAD)
        cache = [_in_place(torch.randn(shape, device="cuda", dtype=torch.bfloat16)) for _ in range(2)]
    calls: dict[str, Callable[[], object]] = {}
    for name, layer in layers.items():
        # A graph of kernels: decoding would measure Python otherwise.
        forward = torch.compile(layer.forward, mode="reduce-overhead", dynamic=False)
        calls[name] = lambda forward=forward: forward(hidden_BSD, *cache)
    return calls


@torch.inference_mode()
def main() -> int:
    """Measure and print."""
    argparse.ArgumentParser(prog="python -m bench.eight_bits", description=__doc__).parse_args()
    if not torch.cuda.is_available():
        print("not measured: there is no GPU")
        return 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; ms a layer, median (quartiles), times BF16")
    layers = {form: layer_in(form) for form in PRODUCTS}
    cases = {f"prefill, {length} tokens": (1, length, 0) for length in PREFILLS}
    cases |= {f"decode, {rows} rows after {CACHED} tokens": (rows, 1, CACHED) for rows in DECODES}
    print("| | " + " | ".join(PRODUCTS) + " |\n| --- |" + " --- |" * len(PRODUCTS))
    for name, case in cases.items():
        torch._dynamo.reset()
        found = milliseconds(calls_of(layers, *case))
        cells = [
            f"{median:.3f} ({low:.3f} to {high:.3f}), {found['bf16'][1] / median:.2f}x"
            for low, median, high in found.values()
        ]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
