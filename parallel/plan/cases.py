"""What a row of published measurements says, and what it leaves to be known.

Fields may be empty. Sizes of the model then come from its public configuration; a micro-batch or interleaving that the
source does not state is taken to be the best that fits, because sources publish what they tuned.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from parallel.plan.hardware import Gpu, gpu_named
from parallel.plan.layout import (
    COMPOSER,
    DEEPSPEED,
    MEGATRON,
    TORCHTITAN,
    Layout,
    Precision,
    Recompute,
    Sharding,
    Stack,
)
from parallel.plan.memory import memory
from parallel.plan.shapes import PublicModel, Shape, public_model

UNSTATED_DATA_RANKS = 32
"""Where neither the GPUs nor the data ranks are stated."""
NOT_DECODERS = r"t5|bert|retro|mamba|hybrid|jamba|vision|multimodal|clip|llava|mla|deepseek|nemotron-?h"
EXPERTS = r"moe|mixtral|\d+x\d+b|[-_ ]a\d+(\.\d+)?b|maverick|scout|dbrx|grok|gpt-oss"
LOGIT_BYTES_OF_OPTIONS = {
    "cross_entropy_loss_fusion": 10.0,  # the jit-fused loss is not in place: bf16, fp32 and its exponential
    "defer_embedding_wgrad": 10.0,  # output gradients of two micro-batches wait
    "_release": 2.0,  # TransformerEngine's loss writes gradients over the bf16 logits
}
"""Megatron's tests are named after the options they set; these change the bytes of a logit."""

Row = Mapping[str, str]


class RowError(ValueError):
    """A row that cannot be modelled; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A row, understood."""

    shape: Shape
    gpu: Gpu
    layouts: tuple[Layout, ...]
    """One, or all that agree with the row where it leaves something open."""
    is_reserved: bool
    """Its memory is what the allocator holds, not what tensors take."""
    is_worst_rank: bool
    """Its memory is the maximum over ranks, not that of the last pipeline stage."""


def case_of(row: Row) -> Case:
    """What a row describes.

    Raises:
        RowError: it leaves out what cannot be known, or cannot be modelled.
        UnknownGpuError: facts of the GPU are missing.
    """
    shape = shape_of_row(row)
    gpu = gpu_named(text_of(row, "gpu") or "H100")
    layout = layout_of_row(row, shape)
    if layout.precision == "fp8" and not gpu.fp8_flops:
        raise RowError(f"{gpu.name} has no fp8 tensor cores; give a bf16 row, or a GPU that has them")
    metric = text_of(row, "mem_metric").lower()
    return Case(
        shape=shape,
        gpu=gpu,
        layouts=_completions(row, shape, gpu, layout),
        is_reserved="reserved" in metric or "torchtitan metric" in metric,
        is_worst_rank="max over ranks" in metric or "worst rank" in metric,
    )


def text_of(row: Row, name: str) -> str:
    """A field, stripped; empty where the column is missing."""
    return (row.get(name) or "").strip()


def number_of(row: Row, name: str) -> float | None:
    """A field as a number above 0, or None where it is empty.

    Raises:
        RowError: it is something else.
    """
    text = text_of(row, name)
    if not text:
        return None
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        raise RowError(f"{name} is {text!r}; it must be a number, or empty where it is not known") from None
    if not (math.isfinite(value) and value > 0):
        raise RowError(f"{name} is {text}; it must be above 0, or empty where it is not known")
    return value


def whole_of(row: Row, name: str) -> int | None:
    """A field as a whole number."""
    value = number_of(row, name)
    if value is not None and value != round(value):
        raise RowError(f"{name} is {text_of(row, name)}; it must be a whole number")
    return None if value is None else round(value)


def shape_of_row(row: Row) -> Shape:
    """The model of a row."""
    name = text_of(row, "model").lower()
    known = public_model(name) or _megatron_test(name)
    if re.search(NOT_DECODERS, name) and not known:
        raise RowError(f"{name} is not a plain decoder-only transformer, which is all that is modelled")
    if re.search(EXPERTS, name) and not known:
        raise RowError(f"{name} is a mixture of experts, and the sizes of its experts are in no column")
    sizes = {key: whole_of(row, key) for key in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab")}
    for key, value in sizes.items():
        if known and (value is None or (key == "ffn" and known.experts > 1)):
            sizes[key] = getattr(known, key)
    layers, hidden, heads = (sizes[key] for key in ("layers", "hidden", "heads"))
    if layers is None or hidden is None or heads is None:
        missing = ", ".join(key for key in ("layers", "hidden", "heads") if sizes[key] is None)
        raise RowError(f"{missing} of {name or 'the model'} not given, and it is not among the public models known")
    gated = known.gated if known else not re.search("gpt|mpt|nemotron|opt|bloom|falcon", name)
    gated = gated or "swiglu" in name
    shape = Shape(
        layers=layers,
        hidden=hidden,
        ffn=sizes["ffn"] or (4 * hidden if not gated else 64 * math.ceil(8 * hidden / 3 / 64)),
        heads=heads,
        kv_heads=sizes["kv_heads"] or heads,
        head_dim=(known.head_dim if known else 0) or hidden // heads,
        # Padded so that tensor ranks share it evenly.
        vocab=128 * math.ceil((sizes["vocab"] or 50257) / 128),
        gated=gated,
        tied=known.tied and "untie" not in name if known else False,
        dropout=_is_small_test(name, hidden),
        experts=known.experts if known else 1,
        experts_per_token=known.experts_per_token if known else 1,
        learned_positions=(whole_of(row, "seq") or 0) if "mpt" in name else 0,
    )
    stated = number_of(row, "params_b")
    return shape if stated is None else _of_stated_size(shape, stated * 1e9, name, is_known=known is not None)


def _of_stated_size(shape: Shape, parameters: float, name: str, *, is_known: bool) -> Shape:
    if not is_known:
        # With a gate and without differ by a third of the layer: the stated size decides.
        other = replace(shape, gated=not shape.gated)
        shape = min((shape, other), key=lambda sizes: abs(sizes.num_parameters - parameters))
    if not 0.8 < shape.num_parameters / parameters < 1.25:
        raise RowError(
            f"{name} is stated to have {parameters / 1e9:g}B parameters, and its sizes make "
            f"{shape.num_parameters / 1e9:.1f}B: a mixture of experts or another architecture, whose further sizes are "
            "in no column"
        )
    return shape


def _megatron_test(name: str) -> PublicModel | None:
    """Megatron's own test models, whose sizes its repository states beside the measurements."""
    match name.split("_"):
        case ["gpt3", "7b", *_]:
            return PublicModel(32, 4096, 16384, 32, 8, 131073, gated=False)
        case ["gpt3", "15b", *_]:
            return PublicModel(32, 6144, 24576, 48, 8, 256000, gated=False)
        case ["gpt3", "mcore" | "345m", *_]:
            return PublicModel(12, 512, 2048, 8, 8, 50257, gated=False, tied=True)
    return None


def _is_small_test(name: str, hidden: int) -> bool:
    return name.startswith("gpt3_") and hidden <= 1024


def layout_of_row(row: Row, shape: Shape) -> Layout:
    """The layout of a row; what it leaves open is filled with the plainest choice."""
    stack, sharding = _stack(row, shape)
    tensor, context, pipeline, data = _axes(row)
    virtual = _virtual_pipeline(row, shape, pipeline)
    if pipeline * virtual > shape.layers:
        raise RowError(
            f"pp x vp = {pipeline * virtual} is more than the {shape.layers} layers; each chunk has one or more"
        )
    sequence = whole_of(row, "seq")
    if sequence is None:
        raise RowError("seq is not given; it must be the tokens of a sequence")
    name, notes = text_of(row, "model").lower(), text_of(row, "notes").lower()
    micro = whole_of(row, "mbs") or 1
    if "sum over pipeline microbatches" in notes:
        micro = max(1, micro // pipeline)
    is_test = _is_small_test(name, shape.hidden)
    precision = _precision(row)
    experts = whole_of(row, "ep") or _experts_in(notes) or math.gcd(shape.experts, data)
    return Layout(
        tensor=tensor,
        context=context,
        pipeline=pipeline,
        virtual_pipeline=virtual,
        data=data,
        expert=min(experts, shape.experts),
        micro_batch=micro,
        global_batch=whole_of(row, "gbs") or data * micro * (2 * pipeline if pipeline > 1 else 1),
        sequence=sequence,
        precision=precision,
        current_scaling=re.search("cs|current|linear|tensorwise", text_of(row, "precision").lower()) is not None,
        recompute=_recompute(row),
        sharding=sharding,
        optimizer_copies=2 if "multi_dist_optimizer_instances" in name else 1,
        sequence_parallel=not is_test or "sequence_parallel" in name,
        stack=stack,
        # Megatron's tests write attention scores out where they do not run on TransformerEngine, or do not resume.
        # FlashAttention appeared in 2022 and was in Megatron after that.
        unfused_attention=(is_test and ("_te_" not in name or "resume" not in name))
        or re.search(r"narayanan|\b20(19|20|21|22)\b", text_of(row, "source").lower()) is not None,
        chunked_loss=_is_liger(row),
        offload="cpu" if "offload" in (text_of(row, "shard") + text_of(row, "sharding")).lower() else "none",
    )


def _axes(row: Row) -> tuple[int, int, int, int]:
    """Tensor, context, pipeline and data sizes; what is empty follows from the others, and else is 1."""
    sizes = {name: whole_of(row, name) for name in ("tp", "cp", "pp", "dp")}
    num_gpus = whole_of(row, "num_gpus")
    stated = math.prod(size for size in sizes.values() if size)
    if num_gpus is None:
        sizes["dp"] = sizes["dp"] or UNSTATED_DATA_RANKS
    elif num_gpus % stated:
        raise RowError(f"tp x cp x pp x dp = {stated} does not divide num_gpus = {num_gpus}")
    else:
        empty = [name for name in ("dp", "tp", "pp", "cp") if sizes[name] is None]
        if num_gpus != stated and not empty:
            raise RowError(f"tp x cp x pp x dp = {stated}, and num_gpus = {num_gpus}; they must be equal")
        sizes.update({name: num_gpus // stated for name in empty[:1]})
    tensor, context, pipeline, data = (sizes[name] or 1 for name in ("tp", "cp", "pp", "dp"))
    return tensor, context, pipeline, data


def _experts_in(notes: str) -> int | None:
    stated = re.search(r"\bep\s*=?\s*(\d+)\b", notes)
    return int(stated[1]) if stated else None


def _virtual_pipeline(row: Row, shape: Shape, pipeline: int) -> int:
    if pipeline == 1:
        return 1
    chunk = re.search(r"layers per virtual stage=(\d+)", text_of(row, "notes").lower())
    return whole_of(row, "vp") or max(1, shape.layers // (pipeline * int(chunk[1])) if chunk else 1)


def _stack(row: Row, shape: Shape) -> tuple[Stack, Sharding]:
    text = (text_of(row, "sharding") or text_of(row, "shard")).lower()
    source, name = text_of(row, "source").lower(), text_of(row, "model").lower()
    stages: dict[str, Sharding] = {"zero-1": "zero1", "zero-2": "zero2", "zero-3": "zero3"}
    for key, stage in stages.items():
        if key in text:
            is_liger = _is_liger(row)
            return (replace(DEEPSPEED, decomposed=False) if is_liger else DEEPSPEED), stage
    if "fsdp" in text or "hsdp" in text or text == "zero3":
        if "foundry" in source or "composer" in source or "mpt" in name:
            return COMPOSER, "zero3"
        is_compiled = "compile" in text_of(row, "notes").lower()
        eager = replace(TORCHTITAN, fused=False, decomposed=True, extra_saved=2.5)
        return (TORCHTITAN if is_compiled else eager), "zero3"
    megatron = MEGATRON
    for option, logit_bytes in LOGIT_BYTES_OF_OPTIONS.items():
        if option in name:
            megatron = replace(MEGATRON, logit_bytes=logit_bytes)
    if text.startswith(("zero1", "zero2", "distributed")):
        return megatron, "zero1"
    if text in ("none", "ddp"):
        return megatron, "none"
    if text:
        raise RowError(f"sharding {text!r} is not known; known are none, zero1, fsdp, FSDP2, ZeRO-1, ZeRO-2, ZeRO-3")
    # Tests say in their name whether they shard the optimizer; who trains billions does.
    is_plain = _is_small_test(name, shape.hidden) and "dist_optimizer" not in name
    return megatron, "none" if is_plain else "zero1"


def _is_liger(row: Row) -> bool:
    notes = text_of(row, "notes").lower()
    return "liger" in notes and "liger off" not in notes


def _precision(row: Row) -> Precision:
    text = text_of(row, "precision").lower()
    if "fp8" in text or "float8" in text:
        return "fp8"
    if text in ("", "bf16", "amp_bf16", "fp16", "amp_fp16", "mixed", "bfloat16") or "see " in text:
        return "bf16"
    raise RowError(f"precision {text!r} is not modelled; bf16, fp16 and fp8 are")


def _recompute(row: Row) -> Recompute:
    text = text_of(row, "recompute").lower()
    if text in ("", "none", "false", "no", "off"):
        return "none"
    if text.startswith(("full", "true", "yes")):
        return "full"
    if text.startswith(("selective", "core", "op")):
        return "selective"
    raise RowError(f"recompute {text!r} is not known; known are none, selective and full")


def _completions(row: Row, shape: Shape, gpu: Gpu, layout: Layout) -> tuple[Layout, ...]:
    """All layouts that agree with the row; those that fit in memory where any does."""
    share = max(1, layout.global_batch // layout.data)
    micros = [layout.micro_batch] if text_of(row, "mbs") else [size for size in (1, 2, 4) if share % size == 0]
    # Rows of memory say in their notes where stages are interleaved.
    is_stated = bool(text_of(row, "vp") or text_of(row, "mem_metric")) or layout.pipeline == 1
    found = []
    for micro in micros:
        chunks = [layout.virtual_pipeline]
        if not is_stated and layout.stack.name == "megatron" and share // micro % layout.pipeline == 0:
            per_stage = shape.layers // layout.pipeline
            chunks = [size for size in range(1, per_stage + 1) if per_stage % size == 0]
        found += [replace(layout, micro_batch=micro, virtual_pipeline=size) for size in chunks]
    if len(found) == 1:
        return tuple(found)
    fitting = [at for at in found if max(stage.needed for stage in memory(shape, at)) <= gpu.memory_bytes]
    return tuple(fitting or found[:1])
