"""The part of a report on smaller models: what was promised and reached, shapes that were tried, what INT8 costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from train.metrics import Candidate, Quantisation, Target
from train.quantities import byte_size, count, estimate, percent
from train.report_style import table
from train.summary import RunSummary


def compression_sections(summary: RunSummary) -> Iterator[str]:
    """Sections of the page; none where the run made no smaller model."""
    if summary.targets:
        yield _targets(summary.targets)
    if len(summary.variants) > 1:
        yield _variants(summary)
    for stage in dict.fromkeys(each["stage"] for each in summary.candidates):
        yield _candidates(stage, [each for each in summary.candidates if each["stage"] == stage])
    for stage in dict.fromkeys(each["stage"] for each in summary.quantisations):
        yield _quantisations(stage, [each for each in summary.quantisations if each["stage"] == stage])


def shape_of(candidate: Candidate) -> str:
    """A shape in a few words."""
    return (
        f"{candidate['num_layers']} layers x {candidate['hidden_size']:,}, FFN {candidate['ffn_hidden_size']:,}, "
        f"{candidate['num_attention_heads']}/{candidate['num_kv_heads']} heads"
    )


def best_of(candidates: Sequence[Candidate]) -> Candidate:
    """The one that was taken: of the smaller shapes, that with the lowest loss."""
    return min(candidates[1:] or candidates, key=lambda each: each["loss"])


def value_of(target: Target) -> str:
    """What was reached, with its error where it has one."""
    value = f"{100 * target['value']:.1f}"
    return f"{value} ± {100 * target['standard_error']:.1f} %" if target["standard_error"] else f"{value} %"


def _targets(targets: Sequence[Target]) -> str:
    rows = []
    for each in targets:
        verdict = '<span class="good">met</span>' if each["met"] else '<span class="noise">not met</span>'
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
    head = [
        "model",
        "parameters",
        "weights on disk",
        *(f"accuracy: {escape(each)}" for each in summary.sources),
        "prefill",
    ]
    return (
        '<h2>Variants</h2><p class="said">Prefill is the scoring of all held-out text by all ranks of this run; INT8 '
        "is computed in floating point here, so its row says nothing of the speed of an INT8 kernel.</p>"
        f"<div class='card'>{table(head, rows, numbers=frozenset(range(1, len(head))))}</div>"
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
                count(each["num_parameters"]),
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
            "kept in higher precision" if each["kept"] else "INT8",
        ]
        for each in parts
    ]
    head = ["rounded", "loss added", "same likeliest token", ""]
    return (
        f'<h2>INT8 by {escape(stage)}</h2><p class="said">Scheme {escape(parts[0]["scheme"])}: each layer rounded '
        "alone, then all together; nats a token on calibration text.</p>"
        f"<div class='card'>{table(head, rows, numbers=frozenset({1, 2}))}</div>"
    )
