"""Published measurements in CSV: what a row says and what it leaves to be known, and predictions for it.

Fields may be empty. Sizes of the model then come from its public configuration; a micro-batch or interleaving that the
source does not state is taken to be the best that fits, because sources publish what they tuned.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from parallel.plan.hardware import Gpu, gpu_named
from parallel.plan.layout import COMPOSER, DEEPSPEED, MEGATRON, TORCHTITAN, Layout, Precision, Recompute, Sharding, Stack
from parallel.plan.memory import memory
from parallel.plan.shapes import PublicModel, Shape, public_model
from parallel.plan.throughput import step_time

GIB = 2**30
COLUMNS = (
    "predicted_tokens_per_s_per_gpu",
    "predicted_peak_gib",
    "predicted_allocated_gib",
    "predicted_worst_stage_peak_gib",
    "predicted_worst_stage_allocated_gib",
    "reason",
)
"""`predicted_peak_gib` and `predicted_allocated_gib` are of the last pipeline stage, as Megatron's own tests read them,
unless the row's `mem_metric` says that it is the maximum over ranks; the worst-stage columns always are that."""
UNSTATED_DATA_RANKS = 32
"""Where neither the GPUs nor the data ranks are stated."""

Row = Mapping[str, str]


class RowError(ValueError):
    """A row that cannot be modelled; the message is the `reason`."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """GiB and tokens/s of one GPU."""

    layout: Layout
    tokens_per_s_per_gpu: float
    peak_gib: float
    allocated_gib: float
    worst_peak_gib: float
    worst_allocated_gib: float


def case_of(row: Row) -> Case:
    """What a row describes.

    Raises:
        RowError: it leaves out what cannot be known, or cannot be modelled.
        UnknownGpuError: facts of the GPU are missing.
    """
    shape = _shape(row)
    gpu = gpu_named(_text(row, "gpu") or "H100")
    layout = _layout(row, shape)
    metric = _text(row, "mem_metric").lower()
    return Case(
        shape=shape,
        gpu=gpu,
        layouts=tuple(_completions(row, shape, gpu, layout)),
        is_reserved="reserved" in metric or "torchtitan metric" in metric,
        is_worst_rank="max over ranks" in metric or "worst rank" in metric,
    )


def predict(row: Row) -> Prediction:
    """Throughput and memory of a row.

    Raises:
        RowError, UnknownGpuError: as `case_of`.
    """
    return predict_case(case_of(row))


def predict_case(case: Case) -> Prediction:
    """Throughput and memory of an understood row: of the fastest layout that agrees with it."""
    timed = [(step_time(case.shape, layout, case.gpu).tokens_per_s_per_gpu, layout) for layout in case.layouts]
    rate, layout = max(timed, key=lambda pair: pair[0])
    stages = memory(case.shape, layout)
    peaks = [stage.reserved if case.is_reserved else stage.peak for stage in stages]
    allocated = [stage.allocated for stage in stages]
    shown = max if case.is_worst_rank else _last
    return Prediction(
        layout=layout,
        tokens_per_s_per_gpu=rate,
        peak_gib=shown(peaks) / GIB,
        allocated_gib=shown(allocated) / GIB,
        worst_peak_gib=max(peaks) / GIB,
        worst_allocated_gib=max(allocated) / GIB,
    )


def predict_file(source: Path, target: Path) -> tuple[int, int]:
    """Write the rows of `source` to `target` with the prediction columns; how many were predicted, of how many."""
    with source.open(newline="") as file:
        reader = csv.DictReader(file)
        names = [name for name in reader.fieldnames or () if name not in COLUMNS]
        rows = list(reader)
    predicted = [_filled(row) for row in rows]
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*names, *COLUMNS], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, **columns} for row, columns in zip(rows, predicted, strict=True))
    return sum(not columns["reason"] for columns in predicted), len(rows)


def _last(values: list[float]) -> float:
    return values[-1]


def _filled(row: Row) -> dict[str, str]:
    try:
        found = predict(row)
    except ValueError as error:
        return {**dict.fromkeys(COLUMNS, ""), "reason": str(error)}
    values = (
        found.tokens_per_s_per_gpu,
        found.peak_gib,
        found.allocated_gib,
        found.worst_peak_gib,
        found.worst_allocated_gib,
    )
    return {**dict(zip(COLUMNS, (f"{value:.6g}" for value in values), strict=False)), "reason": ""}


def _text(row: Row, name: str) -> str:
    return (row.get(name) or "").strip()


def _number(row: Row, *names: str) -> float | None:
    for name in names:
        text = _text(row, name)
        if text:
            try:
                value = float(text.replace(",", ""))
            except ValueError:
                raise RowError(f"{name} is {text!r}, which is not a number") from None
            if not (math.isfinite(value) and value > 0):
                raise RowError(f"{name} is {text}; it must be above 0")
            return value
    return None


def _whole(row: Row, name: str) -> int | None:
    value = _number(row, name)
    return None if value is None else round(value)


def _shape(row: Row) -> Shape:
    name = _text(row, "model")
    known = public_model(name) or _functional_test(name)
    sizes = {key: _whole(row, key) for key in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab")}
    if known is not None:
        for key, value in sizes.items():
            if value is None:
                sizes[key] = getattr(known, key)
    missing = [key for key in ("layers", "hidden", "heads") if sizes[key] is None]
    if missing:
        raise RowError(f"{name or 'the model'} has no {', '.join(missing)}, and it is not among the public models known")
    layers, hidden, heads = sizes["layers"] or 0, sizes["hidden"] or 0, sizes["heads"] or 0
    params_b = _number(row, "params_b")
    gated = known.gated if known else not re.search("gpt|mpt|nemotron|opt|bloom|falcon", name.lower())
    shape = Shape(
        layers=layers,
        hidden=hidden,
        ffn=sizes["ffn"] or (4 * hidden if not gated else 256 * math.ceil(8 * hidden / 3 / 256)),
        heads=heads,
        kv_heads=sizes["kv_heads"] or heads,
        head_dim=(known.head_dim if known else 0) or hidden // heads,
        vocab=_padded(sizes["vocab"] or 50257),
        gated=gated,
        tied=known.tied if known else False,
        dropout=name.lower().startswith("gpt3_mcore"),
        experts=known.experts if known else 1,
        experts_per_token=known.experts_per_token if known else 1,
        learned_positions=(_whole(row, "seq") or 0) if "mpt" in name.lower() else 0,
    )
    if params_b is not None:
        if known is None:
            # With and without a gate differ by a third: the stated size decides.
            other = replace(shape, gated=not gated)
            shape = min((shape, other), key=lambda s: abs(s.num_parameters - params_b * 1e9))
        if not 0.8 < shape.num_parameters / (params_b * 1e9) < 1.25:
            raise RowError(
                f"{name} is stated to have {params_b:g}B parameters, its sizes make {shape.num_parameters / 1e9:.1f}B "
                "as a dense decoder: a mixture of experts or another architecture, whose further sizes no column gives"
            )
    return shape


def _padded(vocab: int) -> int:
    # Megatron and others pad to a multiple that tensor ranks share.
    return 128 * math.ceil(vocab / 128)


def _functional_test(name: str) -> PublicModel | None:
    """Megatron's own test models, whose sizes its repository states beside the measurements."""
    match name.lower().split("_"):
        case ["gpt3", "7b", *_]:
            return PublicModel(32, 4096, 16384, 32, 8, 131073, gated=False)
        case ["gpt3", "15b", *_]:
            return PublicModel(32, 6144, 24576, 48, 8, 256000, gated=False)
        case ["gpt3", "mcore", *_]:
            return PublicModel(12, 512, 2048, 8, 8, 50257, gated=False, tied=True)
    return None


def _stack(row: Row) -> tuple[Stack, Sharding]:
    text = (_text(row, "sharding") or _text(row, "shard")).lower()
    source = _text(row, "source").lower()
    if "zero-3" in text or "zero-2" in text or "zero-1" in text or "deepspeed" in source:
        stages: dict[str, Sharding] = {"zero-1": "zero1", "zero-2": "zero2"}
        return DEEPSPEED, next((stage for key, stage in stages.items() if key in text), "zero3")
    if "fsdp" in text or "zero3" in text:
        if "torchtitan" in source or "fsdp2" in text:
            eager = "compile" not in _text(row, "notes").lower()
            return (replace(TORCHTITAN, fused=False, extra_saved=2.5) if eager else TORCHTITAN), "zero3"
        return COMPOSER, "zero3"
    if text in ("", "zero1", "zero2"):
        # Tests say in their name whether they shard the optimizer; who trains billions does.
        name = _text(row, "model").lower()
        is_plain = name.startswith("gpt3_mcore") and "dist_optimizer" not in name
        return MEGATRON, "none" if is_plain and not text else "zero1"
    if text in ("none", "ddp"):
        return MEGATRON, "none"
    raise RowError(f"sharding {text!r} is not known; known are none, zero1, fsdp, FSDP2, ZeRO-1, ZeRO-2, ZeRO-3")


def _precision(row: Row) -> Precision:
    text = _text(row, "precision").lower()
    if "fp8" in text:
        return "fp8"
    if text in ("", "bf16", "amp_bf16", "fp16", "amp_fp16", "mixed") or "see " in text:
        return "bf16"
    raise RowError(f"precision {text!r} is not modelled; bf16, fp16 and fp8 are")


def _layout(row: Row, shape: Shape) -> Layout:
    stack, sharding = _stack(row)
    tensor, context, pipeline = (_whole(row, name) or 1 for name in ("tp", "cp", "pp"))
    num_gpus, data = _whole(row, "num_gpus"), _whole(row, "dp")
    others = tensor * context * pipeline
    if data is None:
        if num_gpus is not None and num_gpus % others:
            raise RowError(f"tp x cp x pp = {others} does not divide num_gpus = {num_gpus}")
        data = num_gpus // others if num_gpus is not None else UNSTATED_DATA_RANKS
    sequence = _whole(row, "seq")
    if sequence is None:
        raise RowError("seq, the tokens of a sequence, is not given")
    name, notes = _text(row, "model").lower(), _text(row, "notes").lower()
    shard = _text(row, "shard").lower()
    micro = _whole(row, "mbs") or 1
    chunk = re.search(r"layers per virtual stage=(\d+)", notes)
    virtual = _whole(row, "vp") or (shape.layers // (pipeline * int(chunk[1])) if chunk and pipeline > 1 else 1)
    is_test = name.startswith("gpt3_mcore")
    return Layout(
        tensor=tensor,
        context=context,
        pipeline=pipeline,
        virtual_pipeline=max(1, virtual) if pipeline > 1 else 1,
        data=data,
        expert=math.gcd(shape.experts, data) if shape.experts > 1 else 1,
        micro_batch=micro,
        global_batch=_whole(row, "gbs") or data * micro * (2 * pipeline if pipeline > 1 else 1),
        sequence=sequence,
        precision=_precision(row),
        recompute=_recompute(row),
        sharding=sharding,
        sequence_parallel=not is_test,
        stack=stack,
        # Those of Megatron's tests that are not of TransformerEngine, or ask for it, write attention scores out.
        unfused_attention=is_test and (not name.startswith("gpt3_mcore_te") or "resume" not in name) and "full" not in name,
        chunked_loss="liger" in notes and "liger off" not in notes,
        offload="offload" in shard,
    )


def _recompute(row: Row) -> Recompute:
    match _text(row, "recompute").lower():
        case "full":
            return "full"
        case "selective":
            return "selective"
        case "" | "none" | "false" | "no":
            return "none"
        case other:
            raise RowError(f"recompute {other!r} is not known; known are none, selective and full")


def _completions(row: Row, shape: Shape, gpu: Gpu, layout: Layout) -> Iterator[Layout]:
    """All layouts that agree with the row; those that fit in memory where any does."""
    share = max(1, layout.global_batch // layout.data)
    micros = [layout.micro_batch] if _text(row, "mbs") else [size for size in (1, 2, 4) if share % size == 0]
    # Rows of memory say in their notes where stages are interleaved.
    states_interleaving = _text(row, "vp") or _text(row, "mem_metric") or layout.pipeline == 1
    found = []
    for micro in micros or [1]:
        rounds = share // micro
        chunks = [layout.virtual_pipeline]
        if not states_interleaving and rounds % layout.pipeline == 0:
            per_stage = shape.layers // layout.pipeline
            chunks = [size for size in range(1, per_stage + 1) if per_stage % size == 0]
        found += [replace(layout, micro_batch=micro, virtual_pipeline=size) for size in chunks]
    if len(found) == 1:
        return iter(found)
    fitting = [at for at in found if max(stage.needed for stage in memory(shape, at)) <= gpu.memory_bytes]
    return iter(fitting or found[:1])
