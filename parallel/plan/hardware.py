"""Facts of GPUs that the cost model needs, and nothing that depends on a model or a layout."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

TERA = 1e12
GIGA = 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU and its share of the node's links. Rates are dense (no sparsity), links one direction."""

    name: str
    bf16_flops: float
    """Tensor-core peak with FP32 accumulation, the denominator of MFU."""
    fp8_flops: float
    """0: none."""
    bf16_gemm_flops: float
    """What the largest matrix products reach under the power limit."""
    fp8_gemm_flops: float
    attention_flops: tuple[float, float]
    """Causal attention counted half, heads of 128, long sequences: forward, backward, by the vendor's kernel."""
    flash_attention_flops: tuple[float, float]
    """The same by FlashAttention-2."""
    memory_bytes: float
    """What CUDA reports in all; the context and NCCL take theirs from it."""
    memory_bandwidth: float
    nvlink_bandwidth: float
    """Bytes/s to GPUs of the same node; PCIe where there is no NVLink."""
    network_bandwidth: float
    """Bytes/s to other nodes: the GPU's own share of the network cards."""
    tdp_watts: float
    gpus_per_node: int = 8


# Peaks, memory and links: the vendors' data sheets. GEMM of H100: 789 and 1,422 TFLOP/s sustained, measured on one SXM;
# of A100 (271) and B200 (1,745 in bf16): mamf-finder of github.com/stas00/ml-engineering. Attention of H100: cuDNN
# and FlashAttention-2 measured at 8,192 tokens; of A100: FlashAttention-2's own benchmark. H200 is the H100's die, so
# its rates are the H100's. What B200 reaches in fp8 and attention, and RTX 6000 Ada in all, is an estimate by the share
# of the peak that the nearest measured GPU reaches.
_H100 = Gpu(
    name="H100",
    bf16_flops=989.4 * TERA,
    fp8_flops=1978.9 * TERA,
    bf16_gemm_flops=789 * TERA,
    fp8_gemm_flops=1422 * TERA,
    attention_flops=(626 * TERA, 498 * TERA),
    flash_attention_flops=(337 * TERA, 289 * TERA),
    memory_bytes=79.1 * 2**30,
    memory_bandwidth=3352 * GIGA,
    nvlink_bandwidth=450 * GIGA,
    network_bandwidth=50 * GIGA,  # NDR, 400 Gbit/s for each GPU
    tdp_watts=700,
)
_A100 = Gpu(
    name="A100-80GB",
    bf16_flops=312 * TERA,
    fp8_flops=0,
    bf16_gemm_flops=271 * TERA,
    fp8_gemm_flops=0,
    attention_flops=(200 * TERA, 170 * TERA),
    flash_attention_flops=(200 * TERA, 170 * TERA),
    memory_bytes=79.2 * 2**30,
    memory_bandwidth=2039 * GIGA,
    nvlink_bandwidth=300 * GIGA,
    network_bandwidth=25 * GIGA,  # HDR, 200 Gbit/s for each GPU
    tdp_watts=400,
)
GPUS = {
    "H100": _H100,
    "H200": replace(_H100, name="H200", memory_bytes=139.8 * 2**30, memory_bandwidth=4800 * GIGA),
    "A100-80GB": _A100,
    "A100-40GB": replace(
        _A100, name="A100-40GB", memory_bytes=39.4 * 2**30, memory_bandwidth=1555 * GIGA, network_bandwidth=25 * GIGA
    ),
    "B200": Gpu(
        name="B200",
        bf16_flops=2250 * TERA,
        fp8_flops=4500 * TERA,
        bf16_gemm_flops=1745 * TERA,
        fp8_gemm_flops=3200 * TERA,
        attention_flops=(1400 * TERA, 1050 * TERA),
        flash_attention_flops=(500 * TERA, 430 * TERA),
        memory_bytes=178 * 2**30,
        memory_bandwidth=7700 * GIGA,
        nvlink_bandwidth=900 * GIGA,
        network_bandwidth=50 * GIGA,
        tdp_watts=1000,
    ),
    "RTX 6000 Ada": Gpu(
        name="RTX 6000 Ada",
        bf16_flops=364 * TERA,
        fp8_flops=729 * TERA,
        bf16_gemm_flops=255 * TERA,  # 300 W hold the clock well under boost
        fp8_gemm_flops=480 * TERA,
        attention_flops=(180 * TERA, 150 * TERA),
        flash_attention_flops=(180 * TERA, 150 * TERA),
        memory_bytes=47.4 * 2**30,
        memory_bandwidth=960 * GIGA,
        nvlink_bandwidth=32 * GIGA,  # PCIe 4.0 x16, no NVLink
        network_bandwidth=12.5 * GIGA,
        tdp_watts=300,
        gpus_per_node=4,
    ),
}


class UnknownGpuError(ValueError):
    """A GPU of which the facts are not known."""


def gpu_named(text: str) -> Gpu:
    """The GPU of a free-form name: `H100 (DGX)`, `A100 40GB`, `H100 96GB HBM2e 500W`.

    A power limit, a memory size or HBM2e in the name replaces the fact of the table.

    Raises:
        UnknownGpuError: with the facts to give.
    """
    name = text.upper().replace("-", " ").replace("_", " ")
    sizes = [float(size) for size in re.findall(r"(\d+)\s*GI?B\b", name)]
    watts = [float(power) for power in re.findall(r"(\d{3,4})\s*W\b", name)]
    gpu = _in_table(name, sizes)
    if gpu is None or re.search(r"\bPCIE\b|\bNVL\b", name):
        raise UnknownGpuError(
            f"no facts for GPU {text!r}; known are {', '.join(GPUS)}. A row of parallel/plan/hardware.py needs: dense "
            "bf16 and fp8 FLOP/s (peak, and what large matrix products reach), attention FLOP/s, memory size and "
            "bandwidth, NVLink and network bandwidth per GPU, TDP."
        )
    if "H100" in name and sizes and sizes[0] > 90:
        gpu = replace(gpu, memory_bytes=94.5 * 2**30)
    if "H100" in name and "HBM2E" in name:
        gpu = replace(gpu, memory_bandwidth=2400 * GIGA)
    return with_power_limit(gpu, watts[0]) if watts else gpu


def with_power_limit(gpu: Gpu, watts: float) -> Gpu:
    """The same GPU under a lower limit.

    Power goes with the clock cubed where voltage follows the clock, and with the clock where it is at its floor; the
    square is between them, and agrees with the one published row under a limit (torchtitan, 500 W).
    """
    slower = min(1.0, (watts / gpu.tdp_watts) ** 0.5)

    def both(rates: tuple[float, float]) -> tuple[float, float]:
        return rates[0] * slower, rates[1] * slower

    return replace(
        gpu,
        name=f"{gpu.name} {watts:.0f} W",
        bf16_gemm_flops=gpu.bf16_gemm_flops * slower,
        fp8_gemm_flops=gpu.fp8_gemm_flops * slower,
        attention_flops=both(gpu.attention_flops),
        flash_attention_flops=both(gpu.flash_attention_flops),
        tdp_watts=watts,
    )


def _in_table(name: str, sizes: list[float]) -> Gpu | None:
    if "A100" in name:
        return GPUS["A100-40GB" if 40 in sizes or re.search(r"\b40\b", name) else "A100-80GB"]
    if "6000" in name and "ADA" in name:
        return GPUS["RTX 6000 Ada"]
    found = re.search(r"(?<![A-FH-WYZ0-9])G?(H100|H200|B200)(?!\d)", name)
    return GPUS[found[1]] if found else None
