"""The part of a report on smaller models: what was promised and reached, shapes that were tried, what INT8 costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from train.quantities import byte_size, count, estimate, percent
from train.records import Candidate, Quantisation, Speed, Target, Task
from train.report_style import table
from train.summary import RunSummary, best_of


def compression_sections(summary: RunSummary) -> Iterator[str]:
    """Sections of the page; none where the run made no smaller model."""
    if summary.targets:
        yield _targets(summary.targets)
    if len(summary.variants) > 1:
        yield _variants(summary)
    if summary.speeds:
        yield _speeds(summary.speeds)
    if summary.tasks:
        yield _tasks(summary.tasks)
    for stage in dict.fromkeys(each["stage"] for each in summary.candidates):
        yield _candidates(stage, [each for each in summary.candidates if each["stage"] == stage])
    for stage in dict.fromkeys(each["stage"] for each in summary.quantisations):
        yield _quantisations(stage, [each for each in summary.quantisations if each["stage"] == stage])


def shape_of(candidate: Candidate) -> str:
    """A shape in a few words."""
    experts = f"{candidate['num_experts']} experts of " if candidate["num_experts"] > 1 else ""
    return (
        f"{candidate['num_layers']} layers x {candidate['hidden_size']:,}, "
        f"{experts}FFN {candidate['ffn_hidden_size']:,}, "
        f"{candidate['num_attention_heads']}/{candidate['num_kv_heads']} heads"
    )


def parameters_of(candidate: Candidate) -> str:
    """All of them, and those a token goes through where it does not go through all."""
    every, active = candidate["num_parameters"], candidate["num_active_parameters"]
    return count(every) if active == every else f"{count(every)}, {count(active)} active"


def value_of(target: Target) -> str:
    """What was reached, with its error where it has one."""
    if not is_measured(target):
        return "not measured"
    value = f"{100 * target['value']:.1f}"
    return f"{value} ± {100 * target['standard_error']:.1f} %" if target["standard_error"] else f"{value} %"


def is_measured(target: Target) -> bool:
    """Whether there is a value to hold against the limit."""
    return not math.isnan(target["value"])


def _targets(targets: Sequence[Target]) -> str:
    rows = []
    for each in targets:
        verdict = '<span class="good">met</span>' if each["met"] else '<span class="noise">not met</span>'
        if not is_measured(each):
            verdict = ""
        on = f", {escape(each['source'])}" if each["source"] else ""
        names = f"{escape(each['model'])} / {escape(each['baseline'])}{on}"
        rows.append([escape(each["name"]), names, escape(value_of(each)), percent(each["limit"]), verdict])
    head = ["promise", "ratio of", "reached", "limit", ""]
    return (
        '<h2>Targets</h2><p class="said">Each model next to the control it is fair to compare it with, on the same '
        "documents; errors are standard errors over documents. A rehearsal's models are far too small to say anything "
        f"about full size.</p><div class='card'>{table(head, rows, numbers=frozenset({2, 3}))}</div>"
    )


def _variants(summary: RunSummary) -> str:
    scores = {(each["model"], each["source"]): each for each in summary.evaluations}
    rows = []
    for each in summary.variants:
        row = [escape(each["model"]), count(each["num_parameters"]), byte_size(each["weight_bytes"])]
        for source in summary.sources:
            score = scores.get((each["model"], source))
            error = 100 * score["accuracy_standard_error"] if score else 0
            row.append(f"{percent(score['accuracy'])} &plusmn; {error:.1f}" if score else "")
        rows.append([*row, f"{count(each['prefill_tokens_per_second'])} tokens/s"])
    accuracies = [f"accuracy: {escape(each)}" for each in summary.sources]
    head = ["model", "parameters", "weights on disk", *accuracies, "scored"]
    return (
        '<h2>Variants</h2><p class="said">Scored: all held-out text by all ranks of this run. INT8 and FP8 are '
        "computed in floating point, so their rows say nothing of the speed of their kernels.</p>"
        f"<div class='card'>{table(head, rows, numbers=frozenset(range(1, len(head))))}</div>"
    )


def _speeds(speeds: Sequence[Speed]) -> str:
    rows = []
    for each in speeds:
        prompt, reads, writes = each["prompt_tokens"], each["prefill_seconds"], each["decode_seconds"]
        rows.append(
            [
                escape(each["model"]),
                byte_size(each["disk_bytes"]),
                byte_size(each["memory_bytes"]),
                f"{_rate(prompt, reads)} tokens/s",
                f"{_rate(1, writes)} tokens/s",
                f"{1e3 * reads['median']:.1f} ms",
                f"{1e3 * writes['median']:.1f} ms",
            ]
        )
    head = ["model", "on disk", "in memory", "reads", "writes", "first token after", "a token"]
    device, prompt = speeds[0]["device"].upper(), speeds[0]["prompt_tokens"]
    return (
        f'<h2>Speed of the exported models</h2><p class="said">In transformers on one {device} device, one row, a '
        f"prompt of {prompt} tokens; medians over rounds, with quartiles.</p>"
        f"<div class='card'>{table(head, rows, numbers=frozenset(range(1, len(head))))}</div>"
    )


def _rate(tokens: int, seconds: Mapping[str, float]) -> str:
    return (
        f"{count(tokens / seconds['median'])} ({count(tokens / seconds['high'])} to {count(tokens / seconds['low'])})"
    )


def _tasks(tasks: Sequence[Task]) -> str:
    kinds = list(dict.fromkeys((each["task"], each["metric"], each["num_problems"]) for each in tasks))
    rows = []
    for model in dict.fromkeys(each["model"] for each in tasks):
        mine = {(each["task"], each["metric"]): each for each in tasks if each["model"] == model}
        row = [escape(model)]
        for task, metric, _ in kinds:
            found = mine.get((task, metric))
            row.append(estimate(found["value"], found["standard_error"]) if found else "")
        rows.append(row)
    head = ["model", *(f"{escape(task)}: {escape(metric)} of {number}" for task, metric, number in kinds)]
    return (
        '<h2>Tasks</h2><p class="said">The exported models in transformers; errors are standard errors over problems.'
        f"</p><div class='card'>{table(head, rows, numbers=frozenset(range(1, len(head))))}</div>"
    )


def _candidates(stage: str, candidates: Sequence[Candidate]) -> str:
    from train.report_plots import candidate_figure

    chosen = best_of(candidates)
    rows = []
    for each in candidates:
        mark = '<span class="good">taken</span>' if each is chosen else "unpruned" if each is candidates[0] else ""
        rows.append(
            [
                escape(shape_of(each)),
                parameters_of(each),
                percent(each["size_ratio"]),
                percent(each["importance_kept"]),
                estimate(each["loss"], each["standard_error"]),
                f"{each['seconds']:.2f} s",
                mark,
            ]
        )
    head = ["shape", "parameters", "of the size", "importance kept", "loss before recovery", "scored in", ""]
    return (
        f'<h2>Shapes tried by {escape(stage)}</h2><p class="said">Loss on training text that neither calibration nor '
        "evaluation uses, nats a token, with standard errors over rows.</p>"
        f'<div class="card">{candidate_figure(candidates)}</div>'
        f"<div class='card'>{table(head, rows, numbers=frozenset({1, 2, 3, 4, 5}))}</div>"
    )


def _quantisations(stage: str, parts: Sequence[Quantisation]) -> str:
    rows = [
        [
            escape(each["part"]),
            estimate(each["cost"], each["standard_error"]),
            percent(each["agreement"]),
            "kept in higher precision" if each["kept"] else "FP8" if each["scheme"] == "fp8" else "INT8",
        ]
        for each in parts
    ]
    head = ["rounded", "loss added", "same likeliest token", ""]
    scheme = escape(parts[0]["scheme"])
    return (
        f'<h2>Eight bits by {escape(stage)}</h2><p class="said">Scheme {scheme}: each layer rounded alone, then all '
        "together; nats a token on calibration text.</p>"
        f"<div class='card'>{table(head, rows, numbers=frozenset({1, 2}))}</div>"
    )
